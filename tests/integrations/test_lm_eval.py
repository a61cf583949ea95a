"""The harness's log-likelihoods and generation use the fused distribution."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor
from fusion_detox.errors import (
    CalibratorNotFoundError,
    ConfigError,
    MissingExtraError,
    ModelNotFoundError,
)

lm_eval = pytest.importorskip(
    "lm_eval", reason='lm-eval is not installed: pip install -e ".[lm-eval]"'
)
Maker = Callable[..., PreTrainedModel]
CONFIG = FusionConfig(strength=1.5, plausibility=0.0)
CHOICES = [
    {"q": "The weather was", "a": [" fine", " a complete idiot", " f"], "label": 0},
    {"q": "You are", "a": [" stupid", " so kind"], "label": 1},
    {
        "q": "She reads three newspapers every morning before",
        "a": [" lunch", " school"],
        "label": 0,
    },
]
TEXT = "Thank you so much for your help, it means a lot to all of us. " * 4


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(base / "maps"))


@pytest.fixture
def model(make_gpt2: Maker, byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return make_gpt2(len(byte_tokenizer))


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy, because the harness gives it a padding token."""
    return copy.deepcopy(byte_tokenizer)


@pytest.fixture
def make(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, calibrator: Calibrator
) -> Callable[..., Any]:
    """``make(**arguments)``: the adapter over the small GPT-2."""
    from fusion_detox.integrations.lm_eval import FusionLM

    def build(**arguments: Any) -> Any:
        values = {"calibrator": calibrator, "config": CONFIG, "batch_size": 3, **arguments}
        return FusionLM(pretrained=model, tokenizer=tokenizer, **values)

    return build


@pytest.fixture
def plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def pairs() -> list[tuple[str, str]]:
    found = [(row["q"], answer) for row in CHOICES for answer in row["a"]]
    return [*found, ("", "Thank you"), ("What a", " damn stupid thing to say! Shut up")]


def by_definition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    calibrator: Calibrator,
    ids: list[int],
    count: int,
) -> tuple[float, bool]:
    """Log-likelihood of the last ``count`` tokens, computed position by position."""
    processor = FusionLogitsProcessor(calibrator, tokenizer, CONFIG)
    whole = torch.tensor([ids])
    with torch.no_grad():
        logits = model(whole[:, :-1]).logits
    total, greedy = 0.0, True
    for t in range(len(ids) - count - 1, len(ids) - 1):
        log_probs = processor(whole[:, : t + 1], logits[:, t]).log_softmax(-1)[0]
        total += float(log_probs[ids[t + 1]])
        greedy &= int(log_probs.argmax()) == ids[t + 1]
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_log_likelihoods_are_those_of_the_definition(
    make: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    calibrator: Calibrator,
    plain: Any,
    batch_size: int,
) -> None:
    lm = make(batch_size=batch_size)
    found = lm.loglikelihood(requests("loglikelihood", pairs()), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs(), found, strict=True):
        start = tokenizer(context)["input_ids"] or [lm.prefix_token_id]
        ids = start + tokenizer(continuation)["input_ids"]
        expected = by_definition(
            model, tokenizer, calibrator, ids, len(tokenizer(continuation)["input_ids"])
        )
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    unfused = plain.loglikelihood(requests("loglikelihood", pairs()), disable_tqdm=True)
    assert max(abs(a[0] - b[0]) for a, b in zip(found, unfused, strict=True)) > 0.05


def test_softmax_dtype_keeps_the_precision_of_16_bit_weights(
    make: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    calibrator: Calibrator,
) -> None:
    """The result equals the definition on the same logits in float32."""
    model.to(torch.bfloat16)
    request: Any = (("", ""), tokenizer("The weather was")["input_ids"], [50, 60, 70])
    ((fine, _),) = make(softmax_dtype="float32")._loglikelihood_tokens([request], disable_tqdm=True)
    ids = torch.tensor([[*request[1], *request[2]]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits.float()
    processor = FusionLogitsProcessor(calibrator, tokenizer, CONFIG)
    expected = 0.0
    for t in range(ids.shape[1] - 4, ids.shape[1] - 1):
        log_probs = processor(ids[:, : t + 1], logits[:, t]).log_softmax(-1)
        expected += float(log_probs[0, ids[0, t + 1]])
    assert fine == pytest.approx(expected, abs=1e-4)


def test_greedy_answers_are_those_of_the_fused_distribution(
    make: Callable[..., Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The tokens that generate() chooses with the processor count as greedy."""
    lm = make()
    start = torch.tensor([tokenizer("The weather was")["input_ids"]])
    written = model.generate(
        start, max_new_tokens=4, do_sample=False, logits_processor=[lm.fusion], eos_token_id=None
    )[0].tolist()
    request: Any = (("", ""), written[: start.shape[1]], written[start.shape[1] :])
    wrong: Any = (*request[:2], [*request[2][:-1], (request[2][-1] + 1) % len(tokenizer)])
    found = lm._loglikelihood_tokens([request, wrong], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_texts_that_end_in_the_padding_id_of_the_harness(
    make: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    calibrator: Calibrator,
) -> None:
    """Right padding with 0 makes ``[5, 0]`` and ``[5]`` equal rows of one batch.

    The harness's cache is off, because it is wrong if two requests have the same inputs but
    continuations of different lengths.
    """
    contexts = [[90, 80, 70, 60], [90, 80, 0, 0], [90, 80, 0], [90, 80], [90, 80]]
    continuations = [[5, 6], [7, 8], [7], [0, 0, 7], [0, 33]]
    batch: Any = [(("", ""), a, b) for a, b in zip(contexts, continuations, strict=True)]
    lm = make(batch_size=8, logits_cache=False)
    found = lm._loglikelihood_tokens(batch, disable_tqdm=True)
    for (_, context, continuation), (value, _) in zip(batch, found, strict=True):
        expected = by_definition(
            model, tokenizer, calibrator, context + continuation, len(continuation)
        )
        assert value == pytest.approx(expected[0], abs=1e-4)


def test_rolling_scores_every_token_once_with_windows(
    make: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    calibrator: Calibrator,
) -> None:
    """The text is longer than the model's 64 positions, so it takes several windows."""
    lm = make()
    (found,) = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True
    )
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) > lm.max_length == 64
    first = [lm.prefix_token_id, *ids[:64]]
    expected = by_definition(model, tokenizer, calibrator, first, 64)[0]
    for start in range(64, len(ids), 64):
        end = min(start + 64, len(ids))
        # The last window is filled up with earlier tokens.
        window = ids[end - 65 : end]
        expected += by_definition(model, tokenizer, calibrator, window, end - start)[0]
    assert found == pytest.approx(expected, abs=1e-3)


def test_strength_zero_is_the_plain_model(make: Callable[..., Any], plain: Any) -> None:
    lm = make(strength=0)
    likelihood = requests("loglikelihood", pairs())
    rolling = requests("loglikelihood_rolling", [(TEXT,), ("You are",)])
    until = requests("generate_until", [(row["q"], {"max_gen_toks": 8}) for row in CHOICES])
    assert lm.loglikelihood(likelihood) == plain.loglikelihood(likelihood)
    assert lm.loglikelihood_rolling(rolling) == plain.loglikelihood_rolling(rolling)
    assert lm.generate_until(until) == plain.generate_until(until)


def test_generation_equals_generate_with_the_processor(
    make: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    plain: Any,
) -> None:
    settings = {"max_gen_toks": 12, "do_sample": False, "until": []}
    asked = requests("generate_until", [(row["q"], settings) for row in CHOICES])
    lm = make(batch_size=1)
    found = lm.generate_until(asked, disable_tqdm=True)
    for row, text in zip(CHOICES, found, strict=True):
        ids = tokenizer(row["q"], return_tensors="pt")
        output = model.generate(
            **ids, max_new_tokens=12, do_sample=False, logits_processor=[lm.fusion]
        )
        new = output[0, ids["input_ids"].shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True)
    assert found != plain.generate_until(asked, disable_tqdm=True)
    assert make(batch_size=3).generate_until(asked, disable_tqdm=True) == found


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    """A multiple-choice task and a generation task on a local file."""
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHOICES), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "hf")},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "target_delimiter": "",
        "num_fewshot": 0,
    }
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{a}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    writing = {
        "task": "local_writing",
        "output_type": "generate_until",
        "doc_to_target": "{{a[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    return [{**common, **choice}, {**common, **writing}]


def test_simple_evaluate_by_name_equals_the_adapter(
    make: Callable[..., Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    calibrator_folder: Path,
    tasks: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """As on the command line: a registered name, and the arguments in one string."""
    folder = tmp_path / "target"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results = lm_eval.simple_evaluate(
        "fusion-detox",
        model_args=f"pretrained={folder},calibrator={calibrator_folder},strength=1.5,plausibility=0",
        tasks=tasks,
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    config = results["config"]["fusion"]
    assert (config["calibrator"], config["config"]["strength"]) == (str(calibrator_folder), 1.5)
    direct = make()
    for sample, row in zip(results["samples"]["local_choice"], CHOICES, strict=True):
        asked = requests("loglikelihood", [(row["q"], answer) for answer in row["a"]])
        expected = direct.loglikelihood(asked, disable_tqdm=True)
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx([value for value, _ in expected], abs=1e-4)
        best = max(range(len(found)), key=found.__getitem__)
        assert sample["acc"] == float(best == row["label"])
    written = [sample["resps"][0][0] for sample in results["samples"]["local_writing"]]
    settings = {"max_gen_toks": 6, "until": ["\n"]}
    asked = requests("generate_until", [(row["q"], settings) for row in CHOICES])
    assert written == direct.generate_until(asked, disable_tqdm=True)


def test_only_scored_positions_are_fused(
    make: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The processor is called once per step, whatever the lengths of the contexts."""
    lm = make(batch_size=8)
    calls: list[tuple[int, ...]] = []
    inner = lm.fusion

    def counted(ids: torch.Tensor, scores: torch.Tensor) -> Any:
        calls.append(tuple(scores.shape))
        return inner(ids, scores)

    lm.fusion = counted
    batch: Any = [(("", ""), list(range(20, 20 + n)), [5, 6, 7]) for n in (40, 30, 3)]
    lm._loglikelihood_tokens(batch, disable_tqdm=True)
    assert calls == [(3, len(tokenizer))] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strenght": 1.0}, "did you mean 'strength'"),
        ({"revison": "main"}, "unknown argument 'revison'"),
        ({"config": "strong"}, "give single settings such as strength=1.5"),
        ({"strength": -1.0}, "strength must be a number of at least 0"),
        ({"config": {"strong": 1}}, "unknown fusion settings: strong"),
        ({"trust_remote_code": True}, "code from a model's repository is never run"),
        ({"backend": "seq2seq"}, "use a causal model"),
    ],
)
def test_wrong_arguments(make: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_settings_replace_those_of_the_calibrator(
    make: Callable[..., Any], calibrator: Calibrator
) -> None:
    gentle = make(config=None, strength=0.5, kl_budget=None).fusion.config
    assert gentle == calibrator.config.replace(strength=0.5)
    assert make(config={"strength": 2}).fusion.config == calibrator.config.replace(strength=2)


def test_missing_calibrator_and_target(make: Callable[..., Any], calibrator: Calibrator) -> None:
    from fusion_detox.integrations.lm_eval import FusionLM

    with pytest.raises(CalibratorNotFoundError, match="nowhere"):
        make(calibrator="nowhere")
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        FusionLM(pretrained="no-such-model", calibrator=calibrator)


def test_without_the_harness_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "fusion_detox.integrations.lm_eval"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(MissingExtraError, match=r"'lm_eval'.*\[lm-eval\]"):
        importlib.import_module(name)


def test_command_line_knows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import __main__ as harness
    from lm_eval.api.registry import get_model

    from fusion_detox.integrations.lm_eval import FusionLM, main

    seen: list[list[str]] = []
    monkeypatch.setattr(harness, "cli_evaluate", lambda: seen.append(list(sys.argv)))
    before = list(sys.argv)
    main(["run", "--model", "fusion-detox"])
    assert seen == [["lm-eval", "run", "--model", "fusion-detox"]]
    assert sys.argv == before
    assert get_model("fusion-detox") is FusionLM
