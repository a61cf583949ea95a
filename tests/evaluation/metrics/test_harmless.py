"""Change on given text against a plain loop over prefixes with a real processor."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fusion_detox import FusionConfig, FusionLogitsProcessor
from fusion_detox.errors import ConfigError, DataError, ModelError
from fusion_detox.evaluation.metrics.harmless import (
    changes_on_texts,
    harmless,
    text_ids,
)
from fusion_detox.evaluation.metrics.statistics import Resamples
from fusion_detox.fusion import strength_used


def change_on_texts(model, processor, texts, **options):
    return changes_on_texts(model, [processor], texts, **options)[0]


TEXTS = [
    "The weather was fine, so we walked",
    "She reads",
    "In 1987 the town built a new school; 240 pupils came in the first",
    "a",
    "Thank you so much for your help",
    "He doesn't know",
]
CONFIGS = {
    "contrast": FusionConfig(strength=1.5, plausibility=0.0, threshold=0.05),
    "budget": FusionConfig(strength=4.0, plausibility=0.0, kl_budget=0.05),
    "product": FusionConfig(rule="product", strength=0.4),
    "mixture": FusionConfig(rule="mixture", strength=0.4),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path_factory.getbasetemp() / "maps"))


@pytest.fixture(params=["byte_tokenizer", "other_tokenizer"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def plain(model, processor, ids):
    """KL, change of the top token, and both losses, with one forward pass per prefix."""
    rows = []
    for seen in range(1, len(ids)):
        prefix = torch.tensor([ids[:seen]])
        with torch.no_grad():
            scores = model(input_ids=prefix).logits[:, -1]
            fused = processor(prefix, scores)[0].double().log_softmax(-1).numpy()
        base = scores[0].double().log_softmax(-1).numpy()
        kl = sum(math.exp(f) * (f - b) for f, b in zip(fused, base, strict=True) if f > -math.inf)
        changed = fused[base.argmax()] < fused.max()
        rows.append((kl, changed, -base[ids[seen]], -fused[ids[seen]]))
    return np.array(rows, dtype=float).reshape(-1, 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_position_equals_a_plain_loop(calibrator, tokenizer, make_gpt2, name):
    model = make_gpt2(len(tokenizer), seed=5)
    texts = [text_ids(tokenizer, text) for text in TEXTS]
    assert len({len(ids) for ids in texts}) >= 5
    processor = FusionLogitsProcessor(calibrator, tokenizer, CONFIGS[name])
    found = change_on_texts(model, processor, texts, batch_size=4)
    alone = FusionLogitsProcessor(calibrator, tokenizer, CONFIGS[name])
    for ids, change in zip(texts, found, strict=True):
        wanted = plain(model, alone, ids)
        assert change.tokens == max(len(ids) - 1, 0) == len(wanted)
        np.testing.assert_allclose(change.kl, wanted[:, 0], atol=2e-5)
        np.testing.assert_array_equal(change.changed, wanted[:, 1] == 1)
        np.testing.assert_allclose(change.loss_base, wanted[:, 2], atol=1e-4)
        np.testing.assert_allclose(change.loss_fused, wanted[:, 3], atol=1e-4)
    assert any(change.changed.any() for change in found)
    assert max(change.kl.max(initial=0) for change in found) > 0.01


@pytest.mark.parametrize("rule", ["contrast", "product", "mixture"])
def test_strength_zero_changes_nothing(calibrator, tokenizer, make_gpt2, rule):
    model = make_gpt2(len(tokenizer))
    texts = [text_ids(tokenizer, text) for text in TEXTS]
    processor = FusionLogitsProcessor(calibrator, tokenizer, FusionConfig(rule=rule, strength=0))
    found = change_on_texts(model, processor, texts)
    for change in found:
        assert (change.kl == 0).all()
        assert not change.changed.any()
        assert (change.loss_fused == change.loss_base).all()
        assert (change.strength == 0).all()
    summary = harmless(found, Resamples(len(found), 0), "none")
    assert summary["kl"] == summary["top1_changed"] == [0.0, 0.0, 0.0]
    assert summary["loss_base"] == summary["loss_fused"]
    assert summary["kl_largest"] == 0


def test_the_base_loss_is_the_models_own(byte_tokenizer, make_llama):
    model = make_llama(len(byte_tokenizer))
    ids = text_ids(byte_tokenizer, TEXTS[0])
    (change,) = change_on_texts(model, lambda ids, scores: scores, [ids])
    whole = torch.tensor([ids])
    with torch.no_grad():
        loss = float(model(input_ids=whole, labels=whole).loss)
    assert change.loss_base.mean() == pytest.approx(loss, rel=1e-5)


def test_batching_changes_nothing_and_prefixes_have_no_padding(byte_tokenizer, make_gpt2):
    model = make_gpt2(len(byte_tokenizer))
    texts = [text_ids(byte_tokenizer, text) for text in TEXTS]
    prefixes = []

    def flat(ids, scores):
        prefixes.extend(tuple(row) for row in ids.tolist())
        return scores / 2

    one = change_on_texts(model, flat, texts, batch_size=1)
    wanted = {tuple(ids[:seen]) for ids in texts for seen in range(1, len(ids))}
    assert set(prefixes) == wanted
    prefixes.clear()
    for a, b in zip(one, change_on_texts(model, flat, texts, batch_size=3), strict=True):
        np.testing.assert_allclose(a.kl, b.kl, atol=1e-5)
        np.testing.assert_allclose(a.loss_fused, b.loss_fused, atol=1e-5)
    assert set(prefixes) == wanted


def test_the_strength_used_keeps_within_the_budget(calibrator, tokenizer, make_gpt2):
    """Fusing with the reported strength gives the fused scores and the reported KL."""
    config = CONFIGS["budget"]
    model = make_gpt2(len(tokenizer), seed=5)
    processor = FusionLogitsProcessor(calibrator, tokenizer, config)
    ids = torch.tensor([text_ids(tokenizer, TEXTS[0])[:6]])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[:, -1]
    fused, strength = processor.with_strength(ids, scores)
    assert torch.equal(fused, processor(ids, scores))
    assert strength.shape == (1,)
    assert 0 < float(strength) < 4
    plain = config.replace(strength=float(strength), kl_budget=None)
    again = FusionLogitsProcessor(calibrator, tokenizer, plain)(ids, scores)
    torch.testing.assert_close(fused, again, atol=1e-5, rtol=1e-5)
    (change,) = change_on_texts(model, processor, [text_ids(tokenizer, TEXTS[2])])
    assert change.kl.max() <= 0.05 + 1e-4
    free = change.strength == 4.0
    # If the strength is lowered, the whole budget is used.
    assert (~free).any()
    np.testing.assert_allclose(change.kl[~free], 0.05, rtol=0.02)


def test_strength_of_rows_that_are_not_fused():
    scores = torch.zeros(3, 4)
    scores[1, 2] = math.nan
    even = torch.full((3, 4), 0.25)
    clean = torch.tensor([[0.97, 0.01, 0.01, 0.01]] * 3)
    mapped = torch.ones(4, dtype=torch.bool)
    for config, wanted in [
        (FusionConfig(strength=2.0), 2.0),
        (FusionConfig(strength=0.0), 0.0),
        (FusionConfig(rule="mixture", strength=0.5), 0.5),
    ]:
        used = strength_used(scores, clean, even, mapped, config)
        assert used.tolist() == [wanted, 0.0, wanted]
    bound = strength_used(scores, clean, even, mapped, FusionConfig(strength=2.0, kl_budget=0.1))
    assert 0 < bound[0] < 2
    assert bound[1] == 0
    none = strength_used(scores, clean, even, ~mapped, FusionConfig(strength=2.0, kl_budget=0.1))
    assert none.tolist() == [2.0, 0.0, 2.0]


def test_the_strength_comes_from_the_processor_or_its_config_or_is_nan(
    calibrator, byte_tokenizer, make_gpt2
):
    model = make_gpt2(len(byte_tokenizer))
    texts = [text_ids(byte_tokenizer, TEXTS[0])]
    constant = FusionLogitsProcessor(calibrator, byte_tokenizer, CONFIGS["contrast"])

    class Other:
        """A processor with settings that does not report its strength."""

        def __init__(self, config):
            self.config = config

        def __call__(self, ids, scores):
            return scores * 1

    told = FusionLogitsProcessor(calibrator, byte_tokenizer, CONFIGS["budget"])
    (one,) = change_on_texts(model, constant, texts)
    assert (one.strength == 1.5).all()
    assert harmless([one], Resamples(1, 0), "t")["strength"] == {
        "mean": 1.5, "p5": 1.5, "p50": 1.5, "p95": 1.5,
    }  # fmt: skip
    changes = change_on_texts(model, told, texts)
    summary = harmless(changes, Resamples(1, 0), "t")["strength"]
    assert summary["mean"] == pytest.approx(changes[0].strength.mean(), abs=1e-6)
    assert summary["p5"] < summary["p50"] <= summary["p95"] <= 4
    (other,) = change_on_texts(model, Other(CONFIGS["product"]), texts)
    assert harmless([other], Resamples(1, 0), "t")["strength"]["mean"] == 0.4
    for unknown in (Other(CONFIGS["budget"]), lambda ids, scores: scores * 1):
        nowhere = change_on_texts(model, unknown, texts)
        assert harmless(nowhere, Resamples(1, 0), "t")["strength"] is None


def test_summary_is_over_tokens_with_intervals_over_texts(calibrator, byte_tokenizer, make_gpt2):
    model = make_gpt2(len(byte_tokenizer), seed=5)
    processor = FusionLogitsProcessor(calibrator, byte_tokenizer, CONFIGS["contrast"])
    found = change_on_texts(model, processor, [text_ids(byte_tokenizer, t) for t in TEXTS])
    summary = harmless(found, Resamples(len(found), 0), "sentences")
    tokens = sum(change.tokens for change in found)
    # A text of one token has no position.
    assert summary["text"] == {"name": "sentences", "texts": 5, "tokens": tokens}
    for name, attribute in [
        ("kl", "kl"),
        ("top1_changed", "changed"),
        ("loss_base", "loss_base"),
        ("loss_fused", "loss_fused"),
    ]:
        joined = np.concatenate([getattr(change, attribute) for change in found])
        value, low, high = summary[name]
        assert value == pytest.approx(joined.mean()), name
        assert low < value < high
    assert summary["kl_largest"] == max(change.kl.max(initial=0) for change in found)
    assert summary["impossible"] == 0
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_a_banned_token_of_the_text_is_infinite_and_counted(byte_tokenizer, make_gpt2):
    model = make_gpt2(len(byte_tokenizer))
    ids = text_ids(byte_tokenizer, TEXTS[0])

    def ban(prefix, scores):
        scores = scores.clone()
        scores[:, ids[3]] = -math.inf
        return scores

    found = change_on_texts(model, ban, [ids, text_ids(byte_tokenizer, TEXTS[1])])
    assert found[0].loss_fused[2] == math.inf
    assert np.isfinite(found[0].kl).all()
    summary = harmless(found, Resamples(2, 0), "t")
    assert summary["loss_fused"] == [None, None, None]
    assert summary["impossible"] == ids[1:].count(ids[3])
    assert summary["kl"][0] > 0


def test_text_ids(byte_tokenizer, other_tokenizer):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    closing = Tokenizer.from_str(other_tokenizer._tokenizer.to_str())
    closing.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=closing, bos_token="<s>", eos_token="</s>")
    own = other_tokenizer("She reads")["input_ids"]
    assert text_ids(wrapped, "She reads") == [1, *own]
    assert text_ids(wrapped, "She reads", 2) == [1, own[0]]
    assert text_ids(byte_tokenizer, "She reads") == byte_tokenizer("She reads")["input_ids"]
    assert text_ids(wrapped, "") in ([], [1])


def test_nothing_to_measure_gives_none(byte_tokenizer, make_gpt2):
    model = make_gpt2(len(byte_tokenizer))
    assert change_on_texts(model, lambda ids, scores: scores, []) == []
    found = change_on_texts(model, lambda ids, scores: scores, [[], [3]])
    summary = harmless(found, Resamples(2, 0), "t")
    assert summary["text"]["tokens"] == 0
    assert summary["kl"] == [None, None, None]
    assert summary["kl_largest"] is summary["strength"] is None


def test_invalid_arguments_raise(byte_tokenizer, make_gpt2):
    model = make_gpt2(len(byte_tokenizer), n_positions=8)

    def same(ids, scores):
        return scores

    assert change_on_texts(model, same, [list(range(9))])[0].tokens == 8
    with pytest.raises(DataError, match="text 1 has 10 tokens, but the model has 8 positions"):
        change_on_texts(model, same, [[1], list(range(10))])
    with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1"):
        change_on_texts(model, same, [[1, 2]], batch_size=0)
    with pytest.raises(ModelError, match="no next-token distribution after 1 tokens of text 1"):
        change_on_texts(model, lambda ids, scores: scores - math.inf, [[1], [1, 2]])
    with pytest.raises(DataError, match="do not fit draws of 3"):
        harmless(change_on_texts(model, same, [[1, 2]]), Resamples(3, 0), "t")


def test_several_processors_and_starts_equal_one_text_and_processor_at_a_time(
    make_llama, byte_tokenizer, calibrator
):
    model = make_llama(len(byte_tokenizer), seed=3)
    processors = [
        FusionLogitsProcessor(calibrator, byte_tokenizer, FusionConfig(strength=s), pad_token_id=0)
        for s in (0.5, 2.0)
    ]
    texts = [text_ids(byte_tokenizer, text) for text in (*TEXTS[:3], TEXTS[4])]
    starts = [2, 3, 1, len(texts[3]) - 1]
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    found = changes_on_texts(model, processors, texts, starts=starts, batch_size=4)
    hook.remove()
    assert len(forwards) == 1
    for processor, changes in zip(processors, found, strict=True):
        for ids, start, change in zip(texts, starts, changes, strict=True):
            (alone,) = change_on_texts(model, processor, [ids])
            for name in ("kl", "loss_base", "loss_fused", "strength"):
                expected = getattr(alone, name)[start - 1 :]
                assert np.allclose(getattr(change, name), expected, rtol=1e-4, atol=1e-6)
            assert (change.changed == alone.changed[start - 1 :]).all()
            assert (change.best == alone.best[start - 1 :]).all()
    assert sum(change.changed.sum() for change in found[1]) > 0
