"""The assistant suite: what fusion does to the answers of a model with a chat template."""

import copy
from collections import Counter

import numpy as np
import pytest

from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError
from fusion_detox.evaluation import EvaluationConfig, evaluate
from fusion_detox.evaluation.assistant import is_assistant, read_requests, unchanged
from fusion_detox.evaluation.metrics.harmless import TextChange
from fusion_detox.generation.chat import chat_prompt
from fusion_detox.generation.sampling import Sampling, complete_batch, jobs
from fusion_detox.processor import FusionLogitsProcessor

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}END{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
CONFIG = EvaluationConfig(
    samples=2,
    max_new_tokens=4,
    scorers=("lexical",),
    similarity=False,
    suites=(),
    harmless_texts=2,
    harmless_tokens=8,
    assistant_requests=13,
    assistant_tokens=8,
    resamples=100,
)
PROMPTS = ["You are a", "The weather was"]
STRONG = FusionConfig(strength=2.0)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(other_tokenizer):
    chat = copy.deepcopy(other_tokenizer)
    chat.chat_template = TEMPLATE.replace("END", "</s>")
    return chat


@pytest.fixture(scope="module")
def model(make_llama, tokenizer):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return make_llama(len(tokenizer), seed=3, max_position_embeddings=512, **ids)


@pytest.fixture
def run(model, tokenizer, calibrator, tmp_path):
    def start(settings, config=CONFIG, target=None):
        results = evaluate(
            target or (model, tokenizer),
            PROMPTS,
            tmp_path / "run",
            calibrator=calibrator,
            settings=settings,
            config=config,
        )
        return {one["name"]: one["assistant"] for one in results["settings"]}

    return start


def test_the_requests():
    requests = read_requests()
    assert Counter(one.kind for one in requests) == {
        **{"harmless": 100, "provoking": 20, "multi_turn": 10}
    }
    assert len({one.messages for one in requests}) == 130
    for one in requests:
        assert len(one.messages) == (3 if one.kind == "multi_turn" else 1)
        assert all(text == text.strip() and text for text in one.messages)
    few = read_requests(13)
    assert Counter(one.kind for one in few) == {"harmless": 10, "provoking": 2, "multi_turn": 1}


def test_strength_0_leaves_every_answer_unchanged(run):
    found = run({"off": FusionConfig(strength=0.0)})
    assert found["base"]["harmless"] is None
    harmless = found["off"]["harmless"]
    assert harmless["answers"] == 10
    assert harmless["unchanged"] == [1.0, 1.0, 1.0]
    assert harmless["first_change"] is None
    assert harmless["kl"] == [0.0, 0.0, 0.0]
    assert harmless["kl_p95"] == 0.0
    for kind in ("provoking", "multi_turn"):
        off, base = dict(found["off"][kind]["lexical"]), dict(found["base"][kind]["lexical"])
        assert off.pop("against_base")["mean"]["difference"][0] == 0.0
        assert base.pop("against_base") is None
        assert off == base


def test_one_pass_finds_what_a_second_generation_would(run, model, tokenizer, calibrator):
    """Each fused answer is generated here, and compared with the target's token for token."""
    settings = {f"s{strength}": FusionConfig(strength=strength) for strength in (0.05, 0.5, 2.0)}
    found = run(settings)
    texts = [
        chat_prompt(tokenizer, one.messages) for one in read_requests(13) if one.kind == "harmless"
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    greedy = Sampling(max_new_tokens=8, greedy=True)

    def answers(processor):
        rows = []
        for job in jobs(texts):  # one by one, unlike the evaluation
            (row,) = complete_batch(model, tokenizer, [job], [ids[job.index]], greedy, processor)
            rows.append([*row.token_ids, *(["stop"] if row.finished else [])])
        return rows

    base, shares = answers(None), set()
    for name, config in settings.items():
        fused = answers(FusionLogitsProcessor(calibrator, tokenizer, config))
        first = [
            next((k for k, pair in enumerate(zip(a, b, strict=False), 1) if pair[0] != pair[1]), 0)
            for a, b in zip(base, fused, strict=True)
        ]
        harmless = found[name]["harmless"]
        assert harmless["unchanged"][0] == pytest.approx(np.mean([k == 0 for k in first]))
        changed = [k for k in first if k]
        assert harmless["first_change"] == (np.median(changed) if changed else None)
        assert harmless["tokens"] == sum(map(len, base))
        assert harmless["kl"][0] > 0
        assert harmless["kl_p95"] > harmless["kl"][0]
        shares.add(harmless["unchanged"][0])
    assert len(shares) > 1  # the strengths differ, so this test can tell them apart


def test_a_single_changed_token_is_found():
    def change(*flags, best=5):
        size = np.zeros(len(flags))
        ids = np.full(len(flags), best)
        return TextChange(size, np.array(flags), size, size, size, ids)

    changes = [change(False, False, True), change(False, False), change(True), change(False, True)]
    found = unchanged(changes, [False, True, False, True], {2, 5}, 50)
    # The last answer ends with another token that stops: no change of its text.
    assert found["unchanged"][0] == 0.5
    assert found["first_change"] == 2.0  # the median of the third and the first token
    assert unchanged(changes[3:], [True], {2}, 50)["unchanged"][0] == 0.0
    assert unchanged(changes[3:], [False], {2, 5}, 50)["unchanged"][0] == 0.0


def test_the_report_shows_the_answers(run, tmp_path):
    run({"strong": STRONG})
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Answers of the assistant" in page
    assert "stay the same, token for token" in page


def test_which_models_are_assistants(model, tokenizer, other_tokenizer):
    assert is_assistant(model, tokenizer)
    assert not is_assistant(model, other_tokenizer)
    template = copy.deepcopy(tokenizer)
    template.chat_template = TEMPLATE.replace("END", "")  # the model does not stop here
    assert not is_assistant(model, template)
    template.chat_template = "{{ raise_exception('no') }}"
    assert not is_assistant(model, template)


def test_it_can_be_switched_off_and_on(run, model, other_tokenizer):
    assert run({"strong": STRONG}, CONFIG.replace(assistant=False))["strong"] is None
    with pytest.raises(ConfigError, match="no chat template"):
        run({}, CONFIG.replace(assistant=True), (model, other_tokenizer))


def test_answers_that_exceed_the_context_stop_before_any_work(run, make_llama, tokenizer, tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    small = make_llama(len(tokenizer), seed=3, **ids)
    with pytest.raises(ConfigError, match=r"exceed the 64 positions .*--no-assistant"):
        run({}, target=(small, tokenizer))
    assert not (tmp_path / "run").exists()


def test_resuming_generates_nothing(run, monkeypatch):
    first = run({"strong": STRONG})
    monkeypatch.setattr("fusion_detox.evaluation.sampling.complete_batch", None)
    monkeypatch.setattr("fusion_detox.evaluation.assistant.changes_on_texts", None)
    assert run({"strong": STRONG}) == first
