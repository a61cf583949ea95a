"""The processor in ``generate()`` is a pure function of the ids, whatever happened before."""

from __future__ import annotations

import copy
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextIteratorStreamer

import fusion_detox
from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor, RowwiseProcessor
from fusion_detox.errors import ConfigError, DataError, VocabularyError
from fusion_detox.fusion import fuse

Maker = Callable[..., PreTrainedModel]
CONFIG = FusionConfig(strength=1.5, plausibility=0.0, threshold=0.05)
VOCABULARIES = ["byte_tokenizer", "other_tokenizer", "sentencepiece_tokenizer"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "maps"
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(folder))


@pytest.fixture(params=VOCABULARIES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    found: PreTrainedTokenizerFast = request.getfixturevalue(request.param)
    return found


def fresh(
    calibrator: Calibrator, tokenizer: PreTrainedTokenizerFast, config: FusionConfig = CONFIG
) -> FusionLogitsProcessor:
    return FusionLogitsProcessor(calibrator, tokenizer, config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, torch.Tensor]:
    """Encode with left padding, using EOS if there is no padding token, as GPT-2 users do."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
    }


TEXTS = ["You are a complete", "The weather was", "What a damn stupid thing to say! Shut"]


@pytest.mark.parametrize("rule", ["contrast", "product", "mixture"])
def test_strength_zero_returns_the_same_scores(
    calibrator: Calibrator, tokenizer: PreTrainedTokenizerFast, rule: Any
) -> None:
    processor = fresh(calibrator, tokenizer, FusionConfig(rule=rule, strength=0))
    scores = torch.randn(2, len(tokenizer))
    assert processor(torch.zeros(2, 3, dtype=torch.long), scores) is scores


def test_the_same_vocabulary_uses_the_calibrator_directly(
    calibrator: Calibrator,
    byte_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = fresh(calibrator, byte_tokenizer)
    assert processor.vocabulary.kind == "identity"
    ids = byte_tokenizer("You are a complete", return_tensors="pt")["input_ids"]
    scores = torch.randn(1, len(byte_tokenizer))
    seen, gather = [], processor.vocabulary.gather
    monkeypatch.setattr(
        processor.vocabulary,
        "gather",
        lambda *args, **kwargs: seen.append((args[3], gather(*args, **kwargs))) or seen[-1][1],
    )
    fused = processor(ids, scores)
    ((places, found),) = seen
    clean, reference = torch.zeros(2, 1, scores.shape[-1]).index_copy(2, places, found[:, None])
    bos = torch.tensor([[calibrator.bos_id]])
    with torch.no_grad():
        logits = calibrator.clean(input_ids=torch.cat([bos, ids], 1)).logits[:, -1]
    mapped = processor.vocabulary.mapped
    assert torch.equal(places, mapped.nonzero().view(-1))
    own = torch.softmax(logits, -1)[:, mapped]
    torch.testing.assert_close(clean[:, mapped], own, atol=1e-6, rtol=1e-5)
    wanted = torch.log_softmax(scores, -1) + 1.5 * torch.nn.functional.softshrink(
        torch.log((clean + CONFIG.floor) / (reference + CONFIG.floor)), 0.05
    ).clamp(-3, 3)
    # Special tokens are not candidates and keep their probability.
    mass = torch.log_softmax(scores, -1)[:, mapped].exp().sum()
    torch.testing.assert_close(
        fused[:, mapped].exp(), torch.softmax(wanted[:, mapped], -1) * mass, atol=1e-5, rtol=1e-4
    )


def test_scores_and_ids_are_not_changed_and_dtype_is_kept(
    calibrator: Calibrator, tokenizer: PreTrainedTokenizerFast
) -> None:
    processor = fresh(calibrator, tokenizer)
    inputs = encode(tokenizer, TEXTS)["input_ids"]
    scores = torch.randn(3, len(tokenizer) + 7)
    scores[0, :9] = -torch.inf
    before = inputs.clone(), scores.clone()
    fused = processor(inputs, scores)
    assert torch.equal(inputs, before[0])
    assert torch.equal(scores, before[1])
    assert fused.exp().sum(-1) == pytest.approx([1.0] * 3, abs=1e-4)
    assert torch.isinf(fused[0, :9]).all()
    assert not torch.isinf(fused[0, 9:]).any()
    half = processor(inputs, scores.bfloat16())
    assert half.dtype == torch.bfloat16
    # Columns of a padded head mean nothing to the calibrator, and keep their probability.
    own = torch.log_softmax(scores, -1)
    torch.testing.assert_close(fused[:, len(tokenizer) :], own[:, len(tokenizer) :])


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_cached_equals_uncached_over_random_histories(
    calibrator: Calibrator, tokenizer: PreTrainedTokenizerFast, data: st.DataObject
) -> None:
    """A reused instance equals one that forgets before each row: extend, roll back, copy, drop."""
    old, new = fresh(calibrator, tokenizer), fresh(calibrator, tokenizer)
    size = len(tokenizer)
    rows = [data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))]
    for step in range(3):
        for _ in range(data.draw(st.integers(1, 3))):
            row = data.draw(st.sampled_from(rows))
            kind = data.draw(st.sampled_from(["extend", "shorten", "copy", "drop", "new", "swap"]))
            if kind == "extend":
                row.extend(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)))
            elif kind == "shorten" and len(row) > 1:
                del row[data.draw(st.integers(1, len(row) - 1)) :]
            elif kind == "copy":
                rows.append(list(row))
            elif kind == "drop" and len(rows) > 1:
                rows.remove(row)
            elif kind == "new":
                rows.append([data.draw(st.integers(0, size - 1))])
            else:
                rows.reverse()
        longest = max(map(len, rows))
        pad = tokenizer.pad_token_id
        if pad is None:
            shown = [row for row in rows if len(row) == longest]
        else:
            shown = [[pad] * (longest - len(row)) + row for row in rows]
        generator = torch.Generator().manual_seed(step)
        scores = torch.randn(len(shown), size, generator=generator) * 2
        ids = torch.tensor(shown)
        fused = old(ids, scores)
        for index in range(len(shown)):
            one = slice(index, index + 1)
            new.reset()
            alone = new(ids[one], scores[one])
            torch.testing.assert_close(fused[one], alone, atol=1e-4, rtol=1e-4)


def stepwise(
    model: PreTrainedModel,
    make: Callable[[], FusionLogitsProcessor],
    inputs: dict[str, torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """Greedy decoding by definition: no cache, one row at a time, a new processor per step."""
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        row = ids[mask.bool()].unsqueeze(0)
        for _ in range(steps):
            with torch.no_grad():
                scores = model(input_ids=row).logits[:, -1].float()
            row = torch.cat([row, make()(row, scores).argmax(-1, keepdim=True)], 1)
        rows.append(row[0, -steps:])
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["make_llama", "make_gpt2"])
def test_greedy_batch_equals_the_definition(
    calibrator: Calibrator,
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(family)(len(tokenizer) + 3, seed=5, eos_token_id=None)
    inputs = encode(tokenizer, TEXTS)
    pad = int(inputs["input_ids"].min()) if tokenizer.pad_token_id is None else None
    pad = tokenizer.eos_token_id if pad is not None else tokenizer.pad_token_id
    processor = FusionLogitsProcessor(calibrator, tokenizer, CONFIG, pad_token_id=pad)
    wanted = stepwise(
        model,
        lambda: FusionLogitsProcessor(calibrator, tokenizer, CONFIG, pad_token_id=pad),
        inputs,
        8,
    )
    for _ in range(2):  # the second call on the same instance must not depend on the first
        found = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, logits_processor=[processor],
            pad_token_id=pad, eos_token_id=None,
        )  # fmt: skip
        assert torch.equal(found[:, -8:], wanted)


def generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], processor: Any, **how: Any
) -> torch.Tensor:
    torch.manual_seed(3)
    found: torch.Tensor = model.generate(
        **inputs, max_new_tokens=7, logits_processor=[processor], pad_token_id=0, **how
    )
    return found


class Uncached:
    """The same processor, with its memory cleared before each call."""

    def __init__(self, make: Callable[[], FusionLogitsProcessor]) -> None:
        self.make = make

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.make()(input_ids, scores)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "top_p": 0.9},
        {"num_beams": 3, "do_sample": False, "length_penalty": 0.5},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 4},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": False, "bad_words_ids": [[5], [6]]},
    ],
    ids=str,
)
def test_modes_equal_uncached(
    calibrator: Calibrator,
    other_tokenizer: PreTrainedTokenizerFast,
    make_llama: Maker,
    how: dict[str, Any],
) -> None:
    model = make_llama(len(other_tokenizer), seed=6)
    texts = TEXTS[:1] if "prompt_lookup_num_tokens" in how else TEXTS[:2]
    inputs = encode(other_tokenizer, texts)
    processor = fresh(calibrator, other_tokenizer)
    wanted = generate(model, inputs, Uncached(lambda: fresh(calibrator, other_tokenizer)), **how)
    for _ in range(2):
        assert torch.equal(generate(model, inputs, processor, **how), wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_assisted_greedy_equals_greedy(
    calibrator: Calibrator, other_tokenizer: PreTrainedTokenizerFast, make_llama: Maker
) -> None:
    size = len(other_tokenizer)
    model, assistant = make_llama(size, seed=6), make_llama(size, seed=7)
    inputs = encode(other_tokenizer, TEXTS[:1])
    processor = fresh(calibrator, other_tokenizer)
    plain = generate(model, inputs, processor, do_sample=False)
    assisted = generate(model, inputs, processor, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, assisted)


def test_interleaved_calls_threads_and_streaming(
    calibrator: Calibrator, other_tokenizer: PreTrainedTokenizerFast, make_llama: Maker
) -> None:
    model = make_llama(len(other_tokenizer), seed=6)
    processor = fresh(calibrator, other_tokenizer)
    batches = [encode(other_tokenizer, [text]) for text in TEXTS]
    wanted = [generate(model, batch, processor, do_sample=False) for batch in batches]
    found: dict[int, torch.Tensor] = {}
    streamer = TextIteratorStreamer(other_tokenizer, skip_prompt=True)

    def work(index: int) -> None:
        streaming = {"streamer": streamer} if index == 0 else {}
        found[index] = model.generate(
            **batches[index], max_new_tokens=7, do_sample=False, pad_token_id=0,
            logits_processor=[processor], **streaming,
        )  # fmt: skip

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    streamed = "".join(streamer)
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(3))
    new = wanted[0][0, batches[0]["input_ids"].shape[1] :]
    assert streamed == other_tokenizer.decode(new)


def test_scores_of_another_model_pass_unchanged_with_a_warning(
    calibrator: Calibrator,
    other_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    processor = fresh(calibrator, other_tokenizer)
    scores = torch.randn(1, 50)
    ids = torch.tensor([[20, 21]])
    assert processor(ids, scores) is scores
    assert processor(ids, scores) is scores
    assert caplog.text.count("belong to another model") == 1


def test_wrong_use_raises_at_construction(
    calibrator: Calibrator, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = Calibrator(calibrator.clean, None, byte_tokenizer, context_length=32)
    with pytest.raises(ConfigError, match="needs a reference model"):
        FusionLogitsProcessor(alone, byte_tokenizer, FusionConfig())
    FusionLogitsProcessor(alone, byte_tokenizer, FusionConfig(rule="mixture", strength=0.5))
    with pytest.raises(ConfigError, match="must be a Calibrator or the name of one, not int"):
        FusionLogitsProcessor(5, byte_tokenizer)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no-such-calibrator"):
        FusionLogitsProcessor("no-such-calibrator", byte_tokenizer)


def test_a_tokenizer_of_another_model_raises_at_the_first_step(
    calibrator: Calibrator, other_tokenizer: PreTrainedTokenizerFast
) -> None:
    processor = fresh(calibrator, other_tokenizer)
    message = "scores have 9000 columns, but the tokenizer has 441 tokens"
    with pytest.raises(VocabularyError, match=message):
        processor(torch.tensor([[20]]), torch.randn(1, 9000))


def test_results_beyond_the_context_depend_only_on_the_ids(
    calibrator: Calibrator, other_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The window moves in strides; stepwise and all at once give the same result."""
    text = " ".join(TEXTS * 6)
    ids = other_tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert ids.shape[1] > 3 * calibrator.context_length
    growing = fresh(calibrator, other_tokenizer)
    scores = torch.randn(1, len(other_tokenizer))
    for length in range(ids.shape[1] - 40, ids.shape[1] + 1):
        grown = growing(ids[:, :length], scores)
    at_once = fresh(calibrator, other_tokenizer)(ids, scores)
    torch.testing.assert_close(grown, at_once, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", [None, 0.05])
def test_with_strength_returns_the_scores_and_the_strength_of_each_row(
    calibrator, other_tokenizer, budget
):
    from fusion_detox.fusion import kl_divergence

    config = FusionConfig(strength=2.0, plausibility=0.0, kl_budget=budget)
    processor = FusionLogitsProcessor(calibrator, other_tokenizer, config)
    ids = torch.tensor([other_tokenizer("The weather was fine")["input_ids"][:4]] * 3)
    scores = torch.randn(3, len(other_tokenizer), generator=torch.Generator().manual_seed(0))
    fused, used = processor.with_strength(ids, scores)
    assert torch.equal(fused, processor(ids, scores))
    if budget is None:
        assert used.tolist() == [2.0, 2.0, 2.0]
    else:
        # The budget is fully used where it binds. Each row alone, at its strength, gives the same.
        assert ((used > 0) & (used < 2)).all()
        spent = kl_divergence(fused, scores.log_softmax(-1))
        torch.testing.assert_close(spent, torch.full((3,), budget), atol=1e-4, rtol=1e-2)
        for row, strength in enumerate(used.tolist()):
            alone = FusionLogitsProcessor(
                calibrator, other_tokenizer, config.replace(strength=strength, kl_budget=None)
            )(ids[row : row + 1], scores[row : row + 1])
            torch.testing.assert_close(alone, fused[row : row + 1], atol=1e-5, rtol=0)
    off = FusionLogitsProcessor(calibrator, other_tokenizer, config.replace(strength=0))
    same, none = off.with_strength(ids, scores)
    assert same is scores
    assert none.tolist() == [0.0, 0.0, 0.0]


def test_a_warm_step_runs_through_few_files(
    calibrator: Calibrator, other_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A reader who follows one decoding step through the code opens at most seven files."""
    listed = listing(calibrator, {"idiot": 3.0, "completely": 2.0})
    processor = fresh(listed, other_tokenizer).with_settings(context_kl=0.1)
    ids = other_tokenizer("You are a complete", return_tensors="pt")["input_ids"]
    scores = torch.randn(1, len(other_tokenizer))
    same_end = other_tokenizer("It is a complete", return_tensors="pt")["input_ids"]
    processor(same_end, scores)
    processor(ids[:, :-1], scores)
    root, files = str(Path(fusion_detox.__file__).parent), set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename.startswith(root):
            files.add(Path(frame.f_code.co_filename).relative_to(root).as_posix())

    sys.setprofile(note)
    try:
        processor(ids, scores)
    finally:
        sys.setprofile(None)
    assert "processor.py" in files
    assert "fusion.py" in files
    assert len(files) <= 7, " ".join(sorted(files))


def test_empty_input_gives_empty_output(
    calibrator: Calibrator, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    processor = fresh(calibrator, byte_tokenizer)
    scores = torch.randn(0, len(byte_tokenizer))
    assert processor(torch.zeros(0, 3, dtype=torch.long), scores) is scores
    fused, strength = processor.with_strength(torch.zeros(0, 3, dtype=torch.long), scores)
    assert fused is scores
    assert strength.shape == (0,)


@pytest.mark.parametrize(
    ("ids", "scores", "message"),
    [
        ((4,), (1, 400), r"input_ids have shape \(4,\), but must be \(batch, length\)"),
        ((1, 1, 4), (1, 400), "for a single row, pass"),
        ((1, 4), (3, 400), r"1 rows of ids came with scores of shape \(3, 400\)"),
        ((3, 4), (1, 400), r"3 rows of ids came with scores of shape \(1, 400\)"),
        ((1, 4), (400,), r"scores of shape \(400,\)"),
        ((0, 4), (2, 400), "one row for each row of ids"),
    ],
)
def test_mismatched_ids_and_scores_are_refused(
    calibrator: Calibrator,
    byte_tokenizer: PreTrainedTokenizerFast,
    ids: tuple[int, ...],
    scores: tuple[int, ...],
    message: str,
) -> None:
    """Nothing is silently broadcast: each row of scores belongs to one row of ids."""
    processor = fresh(calibrator, byte_tokenizer)
    with pytest.raises(DataError, match=message):
        processor(torch.ones(ids, dtype=torch.long), torch.randn(scores))


RULES = [
    FusionConfig(plausibility=0.0, strength=2.0),
    FusionConfig(rule="product", plausibility=0.0, strength=0.9),
    FusionConfig(rule="mixture", plausibility=0.0, strength=0.9),
    FusionConfig(strength=2.0, kl_budget=0.05),
    FusionConfig(strength=2.0, context_kl=5.0),
    FusionConfig(rule="product", strength=0.9, kl_budget=0.05, context_kl=5.0),
    FusionConfig(strength=2.0, outside="remove", plausibility=0.01),
]
MIXED = [0.0, 0.9, 0.3, 0.0, 0.9]


def batch(tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = encode(tokenizer, [*TEXTS, "It is a", "Nobody came to the old"])["input_ids"]
    scores = torch.randn(len(MIXED), len(tokenizer), generator=torch.Generator().manual_seed(0))
    return inputs, scores * 3


@pytest.mark.parametrize("config", RULES, ids=lambda c: f"{c.rule}-{c.kl_budget}-{c.context_kl}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_mixed_batch_equals_the_row_alone(
    calibrator: Calibrator,
    other_tokenizer: PreTrainedTokenizerFast,
    config: FusionConfig,
    dtype: torch.dtype,
) -> None:
    processor = fresh(calibrator, other_tokenizer, config)
    inputs, scores = batch(other_tokenizer)
    scores = scores.to(dtype)
    mixed = processor.with_settings(strength=MIXED)
    fused, used = mixed.with_strength(inputs, scores)
    assert torch.equal(fused, mixed(inputs, scores))
    assert fused.dtype == dtype
    # With the same companions, the numbers are the same to the last bit. (Except for the mixture,
    # in which 1 - strength is rounded once more.)
    active = [row for row, strength in enumerate(MIXED) if strength]
    for strength in set(MIXED):
        own = processor.with_settings(strength=strength)
        together = own(inputs[active], scores[active])
        for place, row in enumerate(active):
            if MIXED[row] == strength:
                if config.rule != "mixture":
                    assert torch.equal(fused[row], together[place])
                alone, alone_used = own.with_strength(inputs[[row]], scores[[row]])
                torch.testing.assert_close(fused[row], alone[0], atol=2e-5, rtol=1e-5)
                torch.testing.assert_close(used[row], alone_used[0], atol=1e-5, rtol=1e-5)
                assert not torch.allclose(alone[0].float(), scores[row].float().log_softmax(-1))
    for row in (0, 3):
        assert torch.equal(fused[row], scores[row])
        assert used[row] == 0


def test_strengths_by_row_for_engines(
    calibrator: Calibrator, other_tokenizer: PreTrainedTokenizerFast
) -> None:
    processor = fresh(calibrator, other_tokenizer)
    inputs, scores = batch(other_tokenizer)
    rows = inputs.tolist()
    wanted = processor.with_settings(strength=MIXED)(inputs, scores)
    for form in (MIXED, tuple(MIXED), torch.tensor(MIXED, dtype=torch.float64)):
        assert torch.equal(processor.fuse_rows(rows, scores, form), wanted)
    assert processor.fuse_rows(rows, scores, [0] * 5) is scores
    assert processor.fuse_rows(rows, scores, 0) is scores
    assert processor.with_settings(strength=[0.0, 0.0])(inputs[:4], scores[:4]).equal(scores[:4])
    assert processor.fuse_rows([], scores[:0], []).shape == (0, len(other_tokenizer))
    one = processor.fuse_rows(rows, scores, torch.tensor(0.5))
    assert torch.equal(one, processor.with_settings(strength=0.5)(inputs, scores))
    # A list of settings lasts until another strength is set.
    assert processor.with_settings(strength=MIXED).with_settings(clip=1.0).strengths == (*MIXED,)
    assert processor.with_settings(strength=MIXED).with_settings(strength=1.0).strengths is None


def test_the_calibrator_does_not_run_for_rows_of_strength_zero(
    calibrator: Calibrator, other_tokenizer: PreTrainedTokenizerFast, monkeypatch: Any
) -> None:
    processor = fresh(calibrator, other_tokenizer)
    inputs, scores = batch(other_tokenizer)
    seen: list[Any] = []
    read = processor._context.read
    monkeypatch.setattr(processor._context, "read", lambda ids: seen.append(ids) or read(ids))
    processor.fuse_rows(inputs.tolist(), scores, MIXED)
    assert seen == [tuple(inputs[row].tolist()) for row in (1, 2, 4)]


@pytest.mark.parametrize(
    "how", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}], ids=str
)
def test_strengths_of_prompts_in_generate(
    calibrator: Calibrator,
    other_tokenizer: PreTrainedTokenizerFast,
    make_llama: Maker,
    how: dict[str, Any],
) -> None:
    """Each prompt's rows get its strength, in every mode in which a prompt has several rows."""
    model = make_llama(len(other_tokenizer), seed=6)
    inputs = encode(other_tokenizer, TEXTS)
    processor = fresh(calibrator, other_tokenizer).with_settings(strength=[0.0, 2.0, 0.5])
    rowwise = RowwiseProcessor(
        [None, processor.with_settings(strength=2.0), processor.with_settings(strength=0.5)]
    )
    found = generate(model, inputs, processor, **how)
    assert torch.equal(found, generate(model, inputs, rowwise, **how))
    plain = generate(model, inputs, processor.with_settings(strength=0), **how)
    if "num_beams" in how:  # no random numbers shared among the prompts
        assert torch.equal(found[0], plain[0])
    assert not torch.equal(found, plain)


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ([1.0, float("nan")], "strength must be a number of at least 0, but is nan"),
        ([1.0, -0.5], "strength must be a number of at least 0, but is -0.5"),
        ([], "the list of strengths is empty"),
        ([1.0, None], "strengths must be numbers, but one is None"),
        (torch.ones(2, 2), "strengths must be numbers, but one is"),
        ("strong", "strength must be a number"),
        ([1.0, 1.0], "2 strengths, but there are 3 rows"),
        ([1.0] * 4, "4 strengths, but there are 3 rows"),
    ],
    ids=str,
)
def test_wrong_strengths_of_prompts(
    calibrator: Calibrator,
    byte_tokenizer: PreTrainedTokenizerFast,
    strength: Any,
    message: str,
) -> None:
    processor = fresh(calibrator, byte_tokenizer)
    ids, scores = torch.ones(3, 4, dtype=torch.long), torch.randn(3, len(byte_tokenizer))
    with pytest.raises(ConfigError, match=message):
        processor.with_settings(strength=strength)(ids, scores)


def test_wrong_strengths_of_rows(
    calibrator: Calibrator, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    processor = fresh(calibrator, byte_tokenizer)
    rows, scores = [[20], [21]], torch.randn(2, len(byte_tokenizer))
    with pytest.raises(ConfigError, match="3 strengths were given for 2 rows"):
        processor.fuse_rows(rows, scores, [1.0, 1.0, 1.0])
    with pytest.raises(ConfigError, match="at least 0, but is nan"):
        processor.fuse_rows(rows, scores, [1.0, float("nan")])
    for rule in ("product", "mixture"):
        bounded = fresh(calibrator, byte_tokenizer, FusionConfig(rule=rule, strength=0.5))
        for wrong in ([0.5, 1.5], 1.5):
            with pytest.raises(ConfigError, match=f"at most 1, but is 1.5 .rule '{rule}'"):
                bounded.fuse_rows(rows, scores, wrong)
            with pytest.raises(ConfigError, match=f"at most 1, but is 1.5 .rule '{rule}'"):
                bounded.with_settings(strength=wrong)


def test_a_processor_of_its_own_for_each_prompt(
    calibrator: Calibrator, other_tokenizer: PreTrainedTokenizerFast
) -> None:
    one = fresh(calibrator, other_tokenizer)
    swapped = Calibrator(calibrator.reference, calibrator.clean, calibrator.tokenizer)
    two = fresh(swapped, other_tokenizer)
    inputs, scores = batch(other_tokenizer)
    inputs, scores = inputs.repeat_interleave(2, 0), scores.repeat_interleave(2, 0)
    fused = RowwiseProcessor([one, None, two, one, None])(inputs, scores)
    for processor, rows in ((one, [0, 1, 6, 7]), (two, [4, 5])):
        assert torch.equal(fused[rows], processor(inputs[rows], scores[rows]))
    assert torch.equal(fused[[2, 3, 8, 9]], scores[[2, 3, 8, 9]])
    assert RowwiseProcessor([None])(inputs, scores) is scores
    with pytest.raises(ConfigError, match="3 processors were given, but there are 10 rows"):
        RowwiseProcessor([one, None, two])(inputs, scores)
    with pytest.raises(ConfigError, match="the list of processors is empty"):
        RowwiseProcessor([])


LISTED = {"idiot": 3.0, "the": 2.0}


def listing(calibrator: Calibrator, words: dict[str, float] = LISTED) -> Calibrator:
    listed = copy.copy(calibrator)
    listed.words = words
    return listed


def test_listed_words_are_held_back_where_the_models_are_not_asked(
    calibrator: Calibrator, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = CONFIG.replace(plausibility=0.0, context_kl=1e3, context_threshold=999.0, clip=6.0)
    texts = ["You are an idi", "You IDIO", "See"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    scores = torch.randn(len(rows), len(tokenizer)).log_softmax(-1)
    plain = FusionLogitsProcessor(calibrator, tokenizer, config, verify="off")
    assert torch.allclose(plain.fuse_rows(rows, scores), scores, atol=1e-5), "the factor is 0"
    listed = FusionLogitsProcessor(listing(calibrator), tokenizer, config, verify="off")
    moved = listed.fuse_rows(rows, scores) - scores
    expected = torch.zeros_like(scores)
    for row, ids in enumerate(rows):
        before = tokenizer.decode(ids)
        for token in range(len(tokenizer)):
            after = tokenizer.decode([*ids, token])
            for found in re.finditer("[a-z]+", after.lower()):
                if found.end() > len(before) and after.startswith(before):
                    nats = LISTED.get(found[0], 0.0)
                    expected[row, token] = min(float(expected[row, token]), -nats)
    assert (expected < 0).any(1).all()
    mapped = plain.vocabulary.mapped
    shift = moved - config.strength * expected  # the same for all candidates of a row
    assert torch.allclose(shift[:, mapped], shift[:, mapped].amax(-1, keepdim=True), atol=1e-3)


def test_listed_words_count_in_full_without_a_context_limit(calibrator: Calibrator) -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    words = torch.tensor([[0.0, 2.0, 0.0]])
    every, none = torch.ones(3, dtype=torch.bool), torch.zeros(1)
    config = FusionConfig(strength=2.0, plausibility=0.0, context_kl=1.0)
    fused = fuse(probs.log(), probs, probs, every, config, context=none, words=words)
    odds = (fused - probs.log()).squeeze(0)
    assert odds[0] - odds[1] == pytest.approx(4.0, abs=1e-4)
    assert odds[0] == pytest.approx(float(odds[2]), abs=1e-5)


def test_word_weight_zero_ignores_the_list(
    calibrator: Calibrator, tokenizer: PreTrainedTokenizerFast
) -> None:
    inputs = encode(tokenizer, TEXTS)["input_ids"]
    scores = torch.randn(3, len(tokenizer))
    without = fresh(calibrator, tokenizer)(inputs, scores)
    ignored = fresh(listing(calibrator), tokenizer, CONFIG.replace(word_weight=0.0))
    assert torch.equal(ignored(inputs, scores), without)
    assert not torch.equal(fresh(listing(calibrator), tokenizer)(inputs, scores), without)
