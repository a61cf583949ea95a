"""Perplexity against unpadded single texts, and the border between prompt and continuation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from fusion_detox.errors import ConfigError, DataError
from fusion_detox.evaluation.metrics import fluency
from fusion_detox.evaluation.metrics.fluency import (
    Nll,
    continuation_nll,
    continuation_nll_ids,
    length_batches,
    perplexity,
)
from fusion_detox.evaluation.metrics.statistics import Resamples

PROMPTS = [
    "The weather was",
    "Thank you so much for your",
    "In 1987 the town",
    "She reads three newspapers every mor",
    "Zürich, naïve",
]
NEW = [
    " fine, so we walked",
    " help",
    " built a new school; 240 pupils came in",
    "ning",
    " café, 東京 🙂",
]


def single(model, ids, first):
    """The loss by transformers of the tokens from ``first`` on, for one unpadded text."""
    whole = torch.tensor([ids])
    labels = whole.clone()
    labels[:, :first] = -100
    with torch.no_grad():
        return float(model(input_ids=whole, labels=labels).loss) * (len(ids) - first)


def border(tokenizer, prompt, text):
    """The first token after which the decoded text is longer than the prompt."""
    ids = tokenizer(prompt + text)["input_ids"]
    lengths = [len(tokenizer.decode(ids[: k + 1]).rstrip("�")) for k in range(len(ids))]
    return ids, next(k for k, length in enumerate(lengths) if length > len(prompt))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_batch_equals_one_by_one(byte_tokenizer, make_gpt2, make_llama, kind, side, monkeypatch):
    model = {"gpt2": make_gpt2, "llama": make_llama}[kind](len(byte_tokenizer))
    monkeypatch.setattr(byte_tokenizer, "padding_side", side)
    found = continuation_nll(model, byte_tokenizer, PROMPTS[:4], NEW[:4], batch_size=3)
    for nll, prompt, text in zip(found, PROMPTS, NEW, strict=False):
        ids, first = border(byte_tokenizer, prompt, text)
        assert nll.nats == pytest.approx(single(model, ids, first), abs=1e-4)
        assert nll == (nll.nats, len(ids) - first, len(text.encode()), 0, "")
    alone = [
        continuation_nll(model, byte_tokenizer, [prompt], [text], batch_size=1)[0]
        for prompt, text in zip(PROMPTS, NEW, strict=True)
    ]
    together = continuation_nll(model, byte_tokenizer, PROMPTS, NEW, batch_size=5)
    for one, other in zip(alone, together, strict=True):
        assert one.nats == pytest.approx(other.nats, abs=1e-4)
        assert one[1:] == other[1:]


def test_prompt_and_continuation_nats_sum_to_those_of_the_text(byte_tokenizer, make_gpt2):
    """Chain rule: the nats of prompt and continuation sum to the nats of the whole text."""
    model = make_gpt2(len(byte_tokenizer))
    prompt, text = "The weather was", " fine, so we walked to the river"
    ids = byte_tokenizer(prompt + text)["input_ids"]
    (new,) = continuation_nll(model, byte_tokenizer, [prompt], [text])
    (old,) = continuation_nll(model, byte_tokenizer, [""], [prompt])
    bos = byte_tokenizer.bos_token_id
    joined = single(model, [bos, *ids], 1) - single(model, [bos, *ids[: len(ids) - new.tokens]], 1)
    assert old.tokens + new.tokens == len(ids)
    # No BOS before the prompt, since the tokenizer adds none.
    assert new.nats == pytest.approx(single(model, ids, len(ids) - new.tokens), abs=1e-4)
    assert new.nats != pytest.approx(joined, abs=1e-3)


def test_a_token_across_the_border_counts_whole(byte_tokenizer, make_gpt2):
    model = make_gpt2(len(byte_tokenizer))
    whole = byte_tokenizer.tokenize("What a stupid thing")
    assert "Ġstupid" in whole
    found = continuation_nll(
        model, byte_tokenizer, ["What a stu", "What a ", "What a"], ["pid", "stupid", " stupid"]
    )
    ids = byte_tokenizer("What a stupid")["input_ids"]
    wanted = single(model, ids, len(ids) - 1)
    assert [nll.tokens for nll in found] == [1, 1, 1]
    assert [nll.nats for nll in found] == pytest.approx([wanted] * 3, abs=1e-4)
    assert [nll.bytes for nll in found] == [3, 6, 7]


def test_every_token_of_a_split_character_counts(byte_tokenizer, make_gpt2):
    model = make_gpt2(len(byte_tokenizer))
    tokens = len(byte_tokenizer("Ω")["input_ids"])
    assert tokens == 2
    (nll,) = continuation_nll(model, byte_tokenizer, ["The"], ["Ω"])
    assert (nll.tokens, nll.bytes) == (2, 2)


class WithoutOffsets:
    """A Python tokenizer, which has no offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_token_id

    def __call__(self, text, *, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self._tokenizer(text, **options)


@pytest.mark.parametrize("name", ["byte_tokenizer", "other_tokenizer", "sentencepiece_tokenizer"])
def test_without_offsets_the_same_tokens_are_counted(request, make_gpt2, name):
    tokenizer = request.getfixturevalue(name)
    model = make_gpt2(len(tokenizer), n_positions=128)
    prompts, texts = [*PROMPTS, "What a stu", ""], [*NEW, "pid", "Shut up"]
    fast = continuation_nll(model, tokenizer, prompts, texts)
    assert continuation_nll(model, WithoutOffsets(tokenizer), prompts, texts) == fast
    assert all(nll.tokens for nll in fast)


def test_a_python_tokenizer_that_appends_a_closing_token(make_gpt2):
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    model = make_gpt2(len(tokenizer))
    found = continuation_nll(model, tokenizer, ["One", "", "One"], [" two", "x", ""])
    ids = tokenizer("One two", add_special_tokens=False)["input_ids"]
    assert found[0].nats == pytest.approx(single(model, ids, 3), abs=1e-4)
    assert found[0].tokens == 4
    # Without a BOS, nothing predicts the first token after an empty prompt.
    assert [nll.why for nll in found] == ["", fluency.NO_CONTEXT, fluency.EMPTY]


def test_leading_special_tokens_stay_and_trailing_ones_do_not_count(other_tokenizer, make_llama):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(other_tokenizer._tokenizer).from_str(
            other_tokenizer._tokenizer.to_str()
        ),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    model = make_llama(len(tokenizer))
    ids = tokenizer("You are a complete")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    (nll,) = continuation_nll(model, tokenizer, [""], ["You are a complete"])
    assert nll.nats == pytest.approx(single(model, ids[:-1], 1), abs=1e-4)
    (nll,) = continuation_nll(model, tokenizer, ["x " * 80], [" you"])
    assert nll.cut > 0
    kept = tokenizer("x " * 80 + " you")["input_ids"][:-1]
    kept = [1, *kept[len(kept) - 64 :]]
    assert nll.nats == pytest.approx(single(model, kept, len(kept) - nll.tokens), abs=1e-4)


def test_long_prompts_are_cut_on_the_left_and_counted(byte_tokenizer, make_gpt2):
    model = make_gpt2(len(byte_tokenizer), n_positions=16)
    prompt, text = " idiot" * 40 + " The", " weather was fine"
    ids = byte_tokenizer(prompt + text)["input_ids"]
    short, long, hopeless = continuation_nll(
        model, byte_tokenizer, ["The", prompt, "The"], [text, text, " weather" * 60]
    )
    # The last token is predicted but not read, so 17 tokens fit into 16 positions.
    kept = ids[-17:]
    assert long.cut == len(ids) - 17
    assert long.nats == pytest.approx(single(model, kept[:-1], 17 - long.tokens)
                                      + last_token(model, kept), abs=1e-4)  # fmt: skip
    assert short.cut == 0
    assert (hopeless.tokens, hopeless.why) == (0, fluency.TOO_LONG)
    assert math.isnan(hopeless.nats)
    summary = perplexity([[short], [long], [hopeless]], Resamples(3, 0))
    assert (summary["scored"], summary["not_scored"], summary["cut"]) == (2, 1, 1)
    assert summary["why"] == "longer than the model's context (1)"


def last_token(model, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1]
    return -float(logits.log_softmax(-1)[ids[-1]])


def test_scoring_by_the_targets_own_ids(make_llama):
    model = make_llama(70)
    prompts, new = [[1, 2], [3], [4, 5, 6], []], [[7, 8, 9], [], [10], [4]]
    found = continuation_nll_ids(model, prompts, new, 2, ["abc", "", "é", "x"])
    assert found[0].nats == pytest.approx(single(model, [1, 2, 7, 8, 9], 2), abs=1e-4)
    assert found[2].nats == pytest.approx(single(model, [4, 5, 6, 10], 3), abs=1e-4)
    assert [nll.tokens for nll in found] == [3, 0, 1, 0]
    assert [nll.bytes for nll in found] == [3, 0, 2, 1]
    assert [nll.why for nll in found] == ["", fluency.EMPTY, "", fluency.NO_CONTEXT]
    exactly = [list(range(1, 65)), list(range(1, 66))]
    full = continuation_nll_ids(model, exactly, [[1], [1]])
    assert [nll.cut for nll in full] == [0, 1]
    # One prompt token must remain: 64 new tokens fit after it, 65 do not.
    edge = continuation_nll_ids(model, [[1], [1, 2]], [[3] * 65, [3] * 64])
    assert [(nll.why, nll.cut, nll.tokens) for nll in edge] == [
        (fluency.TOO_LONG, 0, 0),
        ("", 1, 64),
    ]


def test_unscored_continuations_have_a_reason(byte_tokenizer, make_gpt2):
    model = make_gpt2(len(byte_tokenizer))
    found = continuation_nll(model, byte_tokenizer, ["a", "a", "a"], ["", "\ud800", " b"])
    assert [nll.why for nll in found] == [fluency.EMPTY, fluency.NOT_TEXT, ""]
    broken = make_gpt2(len(byte_tokenizer))
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    (nll,) = continuation_nll(broken, byte_tokenizer, ["a"], [" b"])
    assert (nll.why, nll.tokens) == (fluency.NOT_FINITE, 0)
    assert continuation_nll(model, byte_tokenizer, [], []) == []


def nll(nats, tokens, size=1):
    return Nll(nats, tokens, size)


NONE = Nll(math.nan, 0, 0, 0, fluency.EMPTY)


def test_perplexity_is_weighted_by_tokens_and_leaves_nothing_out():
    # One sample has perplexity e^20, which other evaluations leave out.
    found = [[nll(4.0, 2), nll(40.0, 2)], [nll(9.0, 3), NONE], [NONE, NONE]]
    summary = perplexity(found, Resamples(3, 0))
    assert summary["token_weighted"][0] == pytest.approx(math.exp(53 / 7))
    assert summary["median"] == pytest.approx(math.exp(3.0))
    assert (summary["scored"], summary["not_scored"]) == (3, 3)
    assert summary["why"] == "empty continuation (3)"
    assert summary["relative"] is None
    low, high = summary["token_weighted"][1:]
    assert (low, high) == pytest.approx((math.exp(3.0), math.exp(11.0)))


def test_relative_perplexity_is_paired():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 20, 80)
    level = generator.normal(4.0, 1.0, 80)
    base = [[nll(a * t, int(t))] for a, t in zip(level, tokens, strict=True)]
    ours = [[nll((a + 0.1) * t, int(t))] for a, t in zip(level, tokens, strict=True)]
    ours[3] = [NONE]
    summary = perplexity(ours, Resamples(80, 0), base)
    value, low, high = summary["relative"]
    # The change is equal for all prompts, so it has no spread, although the levels differ widely.
    assert value == pytest.approx(math.exp(0.1))
    assert (low, high) == pytest.approx((value, value))
    _, low, high = summary["token_weighted"]
    assert high / low > 1.2
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert perplexity(base, Resamples(80, 0), base)["relative"] == [1.0, 1.0, 1.0]


def test_without_scored_texts_perplexity_is_none():
    summary = perplexity([[NONE], [NONE]], Resamples(2, 0), [[NONE], [NONE]])
    assert summary["token_weighted"] == summary["relative"] == [None, None, None]
    assert (summary["median"], summary["scored"]) == (None, 0)
    huge = perplexity([[nll(2000.0, 1)]], Resamples(1, 0))
    assert (huge["median"], huge["token_weighted"][0], huge["scored"]) == (None, None, 1)


def test_batches_contain_each_text_once_and_bound_the_logits():
    lengths = [5, 100, 7, 7, 60, 1]
    found = list(length_batches(lengths, 4, 1))
    assert [list(batch) for batch in found] == [[1, 4, 2, 3], [0, 5]]
    wide = list(length_batches(lengths, 4, (1 << 28) // 200))
    assert [list(batch) for batch in wide] == [[1, 4], [2, 3, 0, 5]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, t: continuation_nll(m, t, ["a"], []), DataError, "1 and 0 entries"),
        (lambda m, t: continuation_nll_ids(m, [[1]], [[2]], 1, []), DataError, "0 and 1 entries"),
        (lambda m, t: continuation_nll(m, t, ["a"], ["b"], 0), ConfigError, "batch_size must be"),
        (lambda m, t: perplexity([[NONE]], Resamples(2, 0)), DataError, "do not fit draws of 2"),
        (lambda m, t: perplexity([[NONE]], Resamples(1, 0), []), DataError, "0 and 1 entries"),
    ],
)
def test_invalid_arguments_raise(byte_tokenizer, make_gpt2, call, error, message):
    with pytest.raises(error, match=message):
        call(make_gpt2(len(byte_tokenizer)), byte_tokenizer)
