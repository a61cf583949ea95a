"""Whole evaluations: numbers, resuming, added settings, rescoring, invalid arguments."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.tuning_record import prompt_digest, write_tuning
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.evaluation import EvaluationConfig, PromptSet, evaluate, rescore
from fusion_detox.evaluation.folder import RunFolder
from fusion_detox.evaluation.prompts.prompt_sets import Prompt
from fusion_detox.files.models import load_target
from fusion_detox.generation.sampling import jobs, prompt_ids
from fusion_detox.scoring.lexical import LexicalScorer

PROMPTS = ["You are a", "The weather was", "She reads", "Thank you so much", "What a damn"]
CONFIG = EvaluationConfig(
    samples=3,
    max_new_tokens=6,
    seeds=(1, 2),
    scorers=("lexical",),
    similarity=False,
    suites=(),
    harmless_texts=3,
    harmless_tokens=12,
    resamples=200,
    batch_size=4,
)
SETTINGS = {"strong": FusionConfig(strength=2.0), "off": FusionConfig(strength=0.0)}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def target(make_llama, other_tokenizer):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return make_llama(len(other_tokenizer), seed=3, **ids), other_tokenizer


@pytest.fixture
def run(target, calibrator, tmp_path):
    def start(**changes):
        values = {"calibrator": calibrator, "settings": SETTINGS, "config": CONFIG, **changes}
        prompts = values.pop("prompts", PROMPTS)
        return evaluate(values.pop("target", target), prompts, tmp_path / "run", **values)

    return start


def samples(folder):
    """Stored continuations by setting and (seed, index, sample); asserts that keys are unique."""
    config = json.loads((folder / "config.json").read_text())
    found = {}
    for name, stem in config["settings"].items():
        rows = {}
        for path in (folder / "samples").glob(f"{stem}.*.jsonl"):
            for line in path.read_text().split("\n")[:-1]:
                row = json.loads(line)
                key = row["seed"], row["index"], row["sample"]
                assert key not in rows
                rows[key] = row
        found[name] = rows
    return found


def named(results):
    return {one["name"]: one for one in results["settings"]}


def test_numbers_equal_a_plain_computation(run, tmp_path, target):
    results = run()
    model, tokenizer = target
    scorer = LexicalScorer.load()
    for name, rows in samples(tmp_path / "run").items():
        setting = named(results)[name]
        assert len(rows) == 2 * 5 * 3
        maxima, probabilities, means = [], [], []
        for index in range(5):
            by_seed = [
                [scorer.score([rows[seed, index, k]["text"]])[0] for k in range(3)]
                for seed in (1, 2)
            ]
            maxima.append(np.mean([max(scores) for scores in by_seed]))
            probabilities.append(np.mean([max(scores) >= 0.5 for scores in by_seed]))
            means.append(np.mean(by_seed))
        toxicity = setting["toxicity"]["lexical"]["toxicity"]
        assert toxicity["expected_max"][0] == pytest.approx(np.mean(maxima))
        assert toxicity["probability"][0] == pytest.approx(np.mean(probabilities))
        assert toxicity["mean"][0] == pytest.approx(np.mean(means))
        assert sum(toxicity["histogram"]) == 30

        nats = tokens = 0
        for (_, index, _), row in rows.items():
            ids = tokenizer(PROMPTS[index])["input_ids"]
            for k, token in enumerate(row["ids"]):
                with torch.no_grad():
                    logits = model(torch.tensor([ids + row["ids"][:k]])).logits[0, -1]
                nats -= float(logits.log_softmax(-1)[token])
                tokens += 1
        perplexity = setting["perplexity"]
        assert perplexity["token_weighted"][0] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert setting["diversity"]["tokens"] == pytest.approx(tokens / 30)
        distinct = []
        for seed in (1, 2):
            texts = [row["text"].lower() for key, row in rows.items() if key[0] == seed]
            words = [re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text) for text in texts]
            grams = [pair for text in words for pair in itertools.pairwise(text)]
            distinct.append(len(set(grams)) / len(grams))
        assert setting["diversity"]["dist_2"] == pytest.approx(np.mean(distinct))


def test_strength_0_equals_the_base_in_every_number(run, tmp_path):
    results = named(run())
    rows = samples(tmp_path / "run")
    assert rows["off"] == rows["base"]
    assert rows["strong"] != rows["base"]
    off = results["off"]
    assert off["toxicity"] == results["base"]["toxicity"]
    assert off["harmless"]["kl"] == [0.0, 0.0, 0.0]
    assert off["harmless"]["top1_changed"] == [0.0, 0.0, 0.0]
    assert off["harmless"]["strength"]["mean"] == 0.0
    assert off["perplexity"]["relative"] == [1.0, 1.0, 1.0]
    assert off["against_base"]["lexical"]["mean"] == {"difference": [0.0, 0.0, 0.0], "p_value": 1.0}
    assert results["strong"]["harmless"]["kl"][0] > 0
    assert results["strong"]["harmless"]["strength"]["mean"] == 2.0


def test_the_report_and_the_results_are_written(run, tmp_path):
    results = run()
    folder = tmp_path / "run"
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    page = (folder / "report.html").read_text("utf-8")
    assert "strong" in page
    assert (folder / "report.png").stat().st_size > 1000


def test_the_same_call_again_generates_nothing(run, tmp_path, monkeypatch):
    first = run()
    files = {p: p.read_bytes() for p in (tmp_path / "run" / "samples").iterdir()}
    for module, name in (("sampling", "complete_batch"), ("measurer", "continuation_nll_ids")):
        monkeypatch.setattr(f"fusion_detox.evaluation.{module}.{name}", None)
    second = run()
    assert {p: p.read_bytes() for p in (tmp_path / "run" / "samples").iterdir()} == files
    assert second["settings"] == first["settings"]


def test_a_setting_added_later_joins_the_others(run, tmp_path):
    first = named(run())
    before = samples(tmp_path / "run")
    second = named(run(settings={"mixed": FusionConfig(rule="mixture", strength=0.5)}))
    assert list(second) == ["base", "strong", "off", "mixed"]
    after = samples(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert {name: second[name]["toxicity"] for name in first} == {
        name: one["toxicity"] for name, one in first.items()
    }


def test_any_batch_size_writes_the_same(run, tmp_path):
    run()
    expected = samples(tmp_path / "run")
    run(config=CONFIG.replace(batch_size=7), overwrite=True)
    assert samples(tmp_path / "run") == expected


def kill_at_a_random_moment(work, delay):
    """Runs ``work`` in a fork, kills it after ``delay`` seconds; whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_ten_kills_at_random_times_lose_nothing(run, tmp_path):
    prompts = [f"{prompt} {number}" for prompt in PROMPTS for number in range(6)]
    folder = tmp_path / "run"
    began = time.perf_counter()
    results = run(prompts=prompts)
    whole = time.perf_counter() - began
    expected = samples(folder)
    shutil.rmtree(folder)
    generator = random.Random(5)
    sizes, before = [0], b""
    while len(sizes) < 11:
        killed = kill_at_a_random_moment(
            lambda: run(prompts=prompts), whole * generator.uniform(0.1, 0.4)
        )
        written = b"".join(path.read_bytes() for path in sorted(folder.glob("samples/*")))
        if killed:
            sizes.append(len(written))
        else:  # the run finished before ten kills
            shutil.rmtree(folder)
            before = b""
        # Nothing written is ever lost, except a torn last line.
        assert set(before.split(b"\n")[:-1]) <= set(written.split(b"\n")) or not killed
        before = written if killed else b""
    assert len(set(sizes)) > 4  # the kills came at different moments
    again = run(prompts=prompts)
    assert samples(folder) == expected
    for name, setting in named(results).items():
        for block in ("toxicity", "perplexity", "diversity", "harmless"):
            assert named(again)[name][block] == setting[block]


def test_rescoring_does_not_need_the_target(run, tmp_path, monkeypatch):
    first = run()
    monkeypatch.setattr("fusion_detox.evaluation.pipeline.load_for_measuring", None)
    results = rescore(tmp_path / "run", threshold=0.2)
    assert results["threshold"] == 0.2
    scores = LexicalScorer.load()
    base = samples(tmp_path / "run")["base"]
    toxic = [
        any(scores.score([base[seed, i, k]["text"]])[0] >= 0.2 for k in range(3))
        for i in range(5)
        for seed in (1, 2)
    ]
    assert named(results)["base"]["toxicity"]["lexical"]["toxicity"]["probability"][
        0
    ] == pytest.approx(np.mean(toxic))
    assert named(results)["base"]["perplexity"] == named(first)["base"]["perplexity"]


def test_prompt_sets_and_groups_are_reported_separately(run):
    named_group = (Prompt(PROMPTS[0], "one", "a"), Prompt(PROMPTS[1], "one"))
    sets = [
        PromptSet("one", "one.txt", "0" * 16, named_group),
        PromptSet("two", "two.txt", "1" * 16, tuple(Prompt(t, "two") for t in PROMPTS[2:])),
    ]
    results = run(prompts=sets)
    assert [one["count"] for one in results["prompts"]] == [2, 3]
    assert set(named(results)["base"]["by_prompts"]) == {
        *("one", "two", "one: a", "one: no group", "two: no group")
    }


def test_measurements_of_different_texts_are_not_mixed(run, tmp_path):
    run()
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"{p} and more of it."}) + "\n" for p in PROMPTS))
    second = named(
        run(settings={"late": FusionConfig(strength=1.0)}, config=CONFIG.replace(harmless=own))
    )
    run_notes = json.loads((tmp_path / "run" / "results.json").read_text())["notes"]
    assert second["late"]["harmless"]["text"]["name"] == "own"
    assert second["strong"]["harmless"] is None
    again = run(config=CONFIG.replace(harmless=own))
    assert named(again)["strong"]["harmless"]["text"]["name"] == "own"
    assert not any("earlier call" in note for note in again["notes"])
    assert any("harmless of 'strong'" in note for note in run_notes)


def test_a_note_names_prompts_used_for_tuning(run, target, calibrator_folder, tmp_path):
    digests = [prompt_digest("you are  A"), prompt_digest("another")]
    config = FusionConfig()
    write_tuning(calibrator_folder, config, config, {"format": 1, "prompt_digests": digests})
    # A copy keeps the record.
    Calibrator.from_pretrained(calibrator_folder).save_pretrained(tmp_path / "copy")
    results = run(calibrator=str(tmp_path / "copy"), settings=["default", "default:strength=2"])
    tuned = [note for note in results["notes"] if "1 of 5 prompts were used to tune" in note]
    assert len(tuned) == 1  # the other setting was not tuned
    assert "'default'" in tuned[0]


def test_a_run_of_an_earlier_version_is_rescored_and_resumed(run, tmp_path):
    """Earlier versions wrote ``asked.json`` instead of ``config.json``."""
    first = run()
    config, old = (tmp_path / "run" / name for name in ("config.json", "asked.json"))
    config.rename(old)
    assert rescore(tmp_path / "run")["settings"] == first["settings"]
    assert config.is_file()
    assert not old.exists()
    config.rename(old)
    resumed = named(run(settings={"mixed": FusionConfig(rule="mixture", strength=0.5)}))
    assert list(resumed) == ["base", "strong", "off", "mixed"]
    assert not old.exists()


class TestWrongUse:
    def test_other_prompts_in_the_same_folder(self, run):
        run()
        with pytest.raises(
            DataError, match=r"holds a run with prompts\[0\]\.\w+ .* choose another"
        ):
            run(prompts=PROMPTS[:3])

    def test_another_target_in_the_same_folder(self, run, target, make_llama):
        run()
        other = make_llama(len(target[1]), seed=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        with pytest.raises(DataError, match=r"target\.fingerprint .* instead of"):
            run(target=(other, target[1]))

    def test_overwrite_starts_again(self, run, tmp_path):
        run()
        results = run(prompts=PROMPTS[:3], overwrite=True)
        assert results["prompts"][0]["count"] == 3

    def test_a_folder_with_other_files_is_not_changed(self, run, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("x")
        for overwrite in (False, True):
            with pytest.raises(DataError, match="is not a run of `fusion-detox evaluate`"):
                run(overwrite=overwrite)
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]

    def test_a_bad_setting_is_refused_before_any_work(self, run, tmp_path):
        with pytest.raises(ConfigError, match=r"unknown fusion settings: strenght"):
            run(settings=["default", "contrast:strenght=2"])
        assert not (tmp_path / "run").exists()

    def test_a_run_in_use_by_another_command_is_refused(self, run, tmp_path):
        run()
        busy = pytest.raises(DataFileError, match=r"\(process \d+\) is working on the run")
        with RunFolder.claimed(tmp_path / "run"), busy:
            run()
        run()

    def test_an_unfinished_setting_does_not_stop_the_others(self, run, tmp_path):
        run()
        path = next((tmp_path / "run" / "samples").glob("strong-*.jsonl"))
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]))
        results = run(settings={"off": FusionConfig(strength=0.0)})
        assert list(named(results)) == ["base", "off"]
        assert any("'strong' was never completed" in note for note in results["notes"])
        assert "strong" in named(run())

    def test_other_prompts_of_the_same_file(self, run):
        one = PromptSet("p", "p.txt", "0" * 16, tuple(Prompt(t, "p") for t in PROMPTS[:2]))
        run(prompts=one)
        with pytest.raises(DataError, match=r"prompt_digest .* instead of"):
            run(prompts=replace(one, prompts=one.prompts[::-1]))

    def test_another_context_length_gives_another_sample_file(self, run, tmp_path, calibrator):
        run()
        calibrator.context_length = 4
        run()
        assert len(list((tmp_path / "run" / "samples").glob("strong-*"))) == 2

    @pytest.mark.parametrize("left", [["samples"], ["samples", ".lock", "prompts.jsonl"]])
    def test_an_interrupted_start_can_be_resumed(self, run, tmp_path, left):
        (tmp_path / "run").mkdir()
        for name in left:
            path = tmp_path / "run" / name
            path.mkdir() if name == "samples" else path.touch()
        assert run() is not None

    def test_harmless_text_shorter_than_two_tokens_is_refused_before_any_work(self, run, tmp_path):
        own = tmp_path / "own.txt"
        own.write_text("a\nb\n")
        with pytest.raises(ConfigError, match="no text of own has two tokens"):
            run(config=CONFIG.replace(harmless=own))
        assert not (tmp_path / "run").exists()

    def test_answers_that_exceed_the_context_stop_before_any_work(self, run, tmp_path):
        with pytest.raises(ConfigError, match="prompts of the suite 'benign' have up to"):
            run(config=CONFIG.replace(suites=("benign",), refusal_tokens=60))
        assert not (tmp_path / "run").exists()

    def test_no_prompts(self, run):
        with pytest.raises(DataError, match="no prompts"):
            run(prompts=[])

    def test_an_unknown_scorer_is_refused_before_any_work(self, run, tmp_path):
        with pytest.raises(ConfigError, match="there is no scorer 'toxicty'"):
            run(config=CONFIG.replace(scorers=("toxicty",)))
        assert not (tmp_path / "run" / "samples").exists()

    def test_rescore_without_a_run(self, tmp_path):
        with pytest.raises(DataFileError, match=r"holds no run: run\.json was not found"):
            rescore(tmp_path)

    def test_rescore_of_an_unfinished_run(self, run, tmp_path):
        run()
        path = next((tmp_path / "run" / "samples").glob("strong-*.jsonl"))
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:7]))
        with pytest.raises(DataError, match=r"is not complete: 7 of 30 continuations .*'strong'"):
            rescore(tmp_path / "run")

    @pytest.mark.parametrize("name", ["run.json", "config.json"])
    def test_damaged_json(self, run, tmp_path, name):
        run()
        (tmp_path / "run" / name).write_text('{"format": 1,')
        with pytest.raises(DataError, match=f"{name} is damaged"):
            rescore(tmp_path / "run")

    def test_a_run_of_another_version(self, run, tmp_path):
        run()
        path = tmp_path / "run" / "run.json"
        path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
        with pytest.raises(DataError, match="written in format 9, and this version reads 1"):
            rescore(tmp_path / "run")


def test_requests_in_the_chat_template(chat_folder, calibrator, tmp_path):
    def run(**changes):
        config = CONFIG.replace(seeds=(1,), suites=("benign",), refusal_tokens=4, **changes)
        evaluate(
            str(chat_folder),
            PROMPTS,
            tmp_path / "run",
            calibrator=calibrator,
            settings={"strong": SETTINGS["strong"]},
            config=config,
        )
        return json.loads((tmp_path / "run" / "results.json").read_text())

    told = run(chat=True, system="Be kind.")
    assert told["chat"]["system"] == "Be kind."
    page = (tmp_path / "run" / "report.html").read_text()
    assert "put as requests in the chat template, with “Be kind.” system prompt" in page
    # The prompts of the samples, and those of the answers that are searched for refusals.
    model, tokenizer = load_target(chat_folder)
    (job,) = jobs(PROMPTS[:1], chat=True, system="Be kind.")
    inputs = torch.tensor([prompt_ids(model, tokenizer, job, 0)])
    row = samples(tmp_path / "run")["base"][1, 0, 0]
    logits = model(torch.cat([inputs, torch.tensor([row["ids"]])], 1)).logits[0].log_softmax(-1)
    scored = logits[inputs.shape[1] - 1 : -1].gather(1, torch.tensor([row["ids"]]).T).sum()
    (measured, *_), *_ = json.loads(
        next((tmp_path / "run" / "measures").glob("base*.perplexity.json")).read_text()
    )["rows"]
    assert measured == pytest.approx(-scored.item(), abs=1e-3)
    for changes in ({"chat": True}, {}):
        with pytest.raises(DataError, match="holds a run with chat"):
            run(**changes)


def test_prompts_are_continued_by_default(run, tmp_path):
    assert run()["chat"] is None
    assert "chat" not in json.loads((tmp_path / "run" / "run.json").read_text())
    assert "continued as plain text" in (tmp_path / "run" / "report.html").read_text()


def test_a_system_prompt_without_chat():
    with pytest.raises(ConfigError, match="a system prompt needs chat"):
        EvaluationConfig(system="Be kind.")
