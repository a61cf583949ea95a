"""Quick sizes, the plan of a run, reports of unfinished runs, and resuming after a kill."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, ModelError
from fusion_detox.evaluation import EvaluationConfig, evaluate, rescore
from fusion_detox.evaluation.config import QUICK
from fusion_detox.evaluation.metrics.suites import load_suite
from fusion_detox.evaluation.plan import WHOLE, Plan
from fusion_detox.evaluation.targets import load_for_measuring

PROMPTS = ["You are a", "The weather was", "She reads"]
CONFIG = EvaluationConfig(
    samples=2,
    max_new_tokens=4,
    scorers=("lexical",),
    similarity=False,
    suites=("dialect",),
    group_texts=4,
    harmless_texts=2,
    harmless_tokens=8,
    resamples=100,
)
SETTINGS = {"strong": FusionConfig(strength=2.0), "weak": FusionConfig(strength=0.3)}
DOCS = Path(__file__).parents[2] / "docs" / "evaluate.md"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(make_llama, other_tokenizer, calibrator, tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = make_llama(len(other_tokenizer), seed=3, **ids)

    def start(folder="run", config=CONFIG, **more):
        return evaluate(
            (model, other_tokenizer),
            PROMPTS,
            tmp_path / folder,
            calibrator=calibrator,
            settings=SETTINGS,
            config=config,
            **more,
        )

    return start


def numbers(results):
    """What must not depend on interruptions: everything but times and names."""
    kept = {k: v for k, v in results.items() if k not in ("name", "created", "machine")}
    for one in kept["settings"]:
        del one["cost"]
    return json.loads(json.dumps(kept))


def break_down(monkeypatch, place, after, act):
    """Lets the function at ``place`` work ``after`` times, and then calls ``act``."""
    module, name = place.rsplit(".", 1)
    inner = getattr(__import__(module, fromlist=[name]), name)
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            act()
        return inner(*args, **kwargs)

    monkeypatch.setattr(place, broken)


def fail():
    raise ModelError("the second setting fails")


def test_a_report_exists_after_the_first_setting_when_the_second_fails(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        # One batch for the target alone, one for the first setting.
        break_down(patched, "fusion_detox.evaluation.sampling.complete_batch", 2, fail)
        with pytest.raises(ModelError, match="the second setting fails"):
            run()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [one["name"] for one in results["settings"]] == ["base", "strong"]
    assert results["unfinished"] == "2 of 5 steps are done"
    strong = results["settings"][1]
    assert strong["perplexity"]["relative"][0] is not None
    assert strong["against_base"]["lexical"]["mean"]["difference"][0] is not None
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "This run is not finished" in page
    assert "2 of 5 steps are done" in page
    # Scoring it again does not make it a finished run.
    assert rescore(tmp_path / "run")["unfinished"] == "2 of 5 steps are done"

    done = run()
    assert done["unfinished"] is None
    assert "not finished" not in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert numbers(done) == numbers(run("other"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("place", "after"),
    [
        ("fusion_detox.evaluation.sampling.complete_batch", 1),
        ("fusion_detox.evaluation.measurer.continuation_nll_ids", 2),
        ("fusion_detox.evaluation.measurer.changes_on_texts", 1),
        ("fusion_detox.evaluation.pipeline.build_results", 3),
    ],
    ids=["sampling", "perplexity", "groups", "results"],
)
def test_resuming_after_a_kill_gives_the_same_results(run, tmp_path, monkeypatch, place, after):
    child = os.fork()
    if child == 0:
        try:
            break_down(monkeypatch, place, after, lambda: os.kill(os.getpid(), signal.SIGKILL))
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert (tmp_path / "run" / "report.html").is_file()
    assert numbers(run()) == numbers(run("other"))


def test_a_finished_run_is_not_marked_again(run, tmp_path, monkeypatch):
    run()
    written = []
    inner = __import__("fusion_detox.evaluation.pipeline", fromlist=["x"]).build_results

    def build(*arguments):
        written.append(arguments[-1])
        return inner(*arguments)

    monkeypatch.setattr("fusion_detox.evaluation.pipeline.build_results", build)
    run()
    assert written == [None]


def test_the_target_reads_each_text_once_for_all_settings(run, monkeypatch):
    seen = []
    inner = __import__(
        "fusion_detox.evaluation.measurer", fromlist=["changes_on_texts"]
    ).changes_on_texts

    def counted(model, processors, *args, **kwargs):
        seen.append(len(processors))
        return inner(model, processors, *args, **kwargs)

    monkeypatch.setattr("fusion_detox.evaluation.measurer.changes_on_texts", counted)
    run()
    assert seen == [2, 2]  # the general texts and one suite, with both settings at once


def test_progress_names_every_step_and_ends_at_the_whole(run):
    told = []
    run(progress=lambda *step: told.append(step))
    labels = list(dict.fromkeys(what for what, _, _ in told if what.startswith("step")))
    assert labels == [
        "step 1 of 5: sampling: base",
        "step 2 of 5: sampling: strong",
        "step 3 of 5: sampling: weak",
        "step 4 of 5: reading harmless texts: general",
        "step 5 of 5: reading harmless texts: dialect",
    ]
    whole = [(done, total) for what, done, total in told if what == WHOLE]
    shares = [done / total for done, total in whole]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert len({total for _, total in whole}) == 1


def test_work_of_an_earlier_call_does_not_count():
    told = []
    plan = Plan({"one": 100, "two": 60, "three": 40}, lambda *step: told.append(step))
    one = plan.start("one")
    one(10, 10)  # complete
    assert (told[-2], plan.worked) == ((WHOLE, 0, 100), False)
    two = plan.start("two")
    two(3, 6)  # half done
    assert told[-2] == (WHOLE, 0, 70)
    two(4, 6)
    assert told[-2] == (WHOLE, 10, 70)
    assert plan.worked
    assert str(plan) == "1 of 3 steps are done"
    two(6, 6)
    assert str(plan) == "2 of 3 steps are done"
    three = plan.start("three")
    three(0, 1)
    three(1, 1)
    assert told[-2:] == [(WHOLE, 70, 70), ("step 3 of 3: three", 1, 1)]


def test_quick_is_what_the_documentation_says():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", DOCS.read_text("utf-8"), re.MULTILINE)
    full = EvaluationConfig()
    quick = EvaluationConfig(**QUICK)

    def shown(value):
        if isinstance(value, tuple):
            return ", ".join(value)
        return {True: "yes", False: "no", None: "all"}.get(value, str(value))

    assert rows == [
        (name, shown(getattr(quick, name)), shown(getattr(full, name)))
        for name in QUICK
        if name != "sizes"
    ]


def test_a_quick_run_says_so(run, tmp_path):
    config = EvaluationConfig(**{**QUICK, "scorers": ("lexical",), "group_texts": 2})
    results = run(config=config.replace(max_new_tokens=4, suites=("dialect",), harmless_texts=2))
    assert results["sizes"] == "quick"
    assert any("quick look" in note for note in results["notes"])
    assert "<b>quick</b> run" in (tmp_path / "run" / "report.html").read_text("utf-8")
    full = run("other")
    assert full["sizes"] == "full"
    assert not any("quick" in note for note in full["notes"])


def test_fewer_texts_of_a_suite_are_spread_evenly_in_complete_pairs():
    suite = load_suite("identity")
    few = suite.spread(100)
    sizes = {pair: sum(t.pair == pair for t in few.texts) for pair in {t.pair for t in few.texts}}
    assert len(few.texts) == 3 * 33
    assert sizes == {pair: sum(t.pair == pair for t in suite.texts) for pair in sizes}
    pairs = list(dict.fromkeys(text.pair for text in suite.texts))
    assert [pairs.index(pair) for pair in dict.fromkeys(t.pair for t in few.texts)] == [0, 9, 18]
    assert suite.spread(None) == suite
    assert len(suite.spread(1).texts) == 33  # at least one pair
    assert few.digest() != suite.digest()
    assert len(load_suite("general").spread(5).texts) == 5


def test_16_bit_weights_become_float32_on_the_cpu(target_folder, tmp_path):
    model, tokenizer = load_for_measuring(str(target_folder), device="cpu")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    tokenizer.save_pretrained(tmp_path / "narrow")
    narrow = str(tmp_path / "narrow")
    assert load_for_measuring(narrow, device="cpu")[0].dtype == torch.float32
    kept = load_for_measuring(narrow, device="cpu", dtype="bfloat16")[0]
    assert kept.dtype == torch.bfloat16


def test_group_texts_out_of_range():
    with pytest.raises(ConfigError, match="group_texts must be a whole number of at least 1"):
        EvaluationConfig(group_texts=0)
