"""The recent divergence of the two models equals its definition, however it is requested."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor
from fusion_detox.decoding.kv_cache import Row
from fusion_detox.decoding.session import CalibratorSession, RecentDivergence
from fusion_detox.errors import ConfigError

Ids = tuple[int, ...]


def text(seed: int, length: int) -> Ids:
    return tuple(random.Random(seed).choices(range(5, 200), k=length))


def by_definition(calibrator: Calibrator, ids: Ids) -> float:
    """Compute it by one forward pass without a cache for each of the last 16 positions."""
    length, found = calibrator.context_length, []
    assert calibrator.reference is not None
    for end in range(max(0, len(ids) - 15), len(ids) + 1):
        start = 0
        while end - start + 1 > length:
            start += length // 2
        seen = torch.tensor([[calibrator.bos_id, *ids[start:end]]])
        with torch.no_grad():
            clean = calibrator.clean(input_ids=seen).logits[0, -1].double().log_softmax(-1)
            reference = calibrator.reference(input_ids=seen).logits[0, -1].double().log_softmax(-1)
        found.append(float((reference.exp() * (reference - clean)).sum()))
    return sum(found) / len(found)


@pytest.fixture
def session(calibrator: Calibrator) -> CalibratorSession:
    return CalibratorSession(calibrator, device=torch.device("cpu"), max_rows=4)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 32, 70])
def test_divergence_is_the_mean_over_the_last_sixteen_positions(
    calibrator: Calibrator, session: CalibratorSession, length: int
) -> None:
    ids = text(length, length)
    (found,) = session.recent_divergence([ids])
    assert found == pytest.approx(by_definition(calibrator, ids), rel=1e-4)
    assert found > 0


def test_the_order_of_requests_does_not_matter(
    calibrator: Calibrator, session: CalibratorSession
) -> None:
    rng = random.Random(3)
    texts = [text(seed, 60) for seed in range(4)]
    asked = [one[:end] for one in texts for end in range(0, 61, 3)] * 2
    rng.shuffle(asked)
    while asked:
        batch, asked = asked[: (count := rng.randint(1, 5))], asked[count:]
        for ids, found in zip(batch, session.recent_divergence(batch), strict=True):
            (alone,) = CalibratorSession(calibrator, device=torch.device("cpu")).recent_divergence(
                [ids]
            )
            assert found == pytest.approx(alone, rel=1e-4)
        if rng.random() < 0.1:
            session.reset()


def test_one_more_token_costs_one_more_position() -> None:
    recent, ids = RecentDivergence(32), text(1, 40)

    def ask(*texts: Ids) -> list[Ids]:
        unknown = recent.unknown(texts)
        recent.means(texts, dict.fromkeys(unknown, 1.0))
        return unknown

    assert ask(ids[:30], ids[:30]) == [ids[:end] for end in range(15, 31)]
    assert ask(ids[:31]) == [ids[:31]]
    assert ask(ids[:33], ids[:31]) == [ids[:32], ids[:33]]  # a few at a time, across vocabularies


def remember(recent: RecentDivergence, ids: Ids) -> None:
    recent.means([ids], dict.fromkeys(recent.unknown([ids]), 0.0))


def test_the_memo_is_bounded() -> None:
    recent = RecentDivergence(32)
    for number in range(9000):
        remember(recent, (number,))
    assert len(recent._memo) <= 4096


def test_the_memo_of_long_texts_is_bounded() -> None:
    """It stores only the part of a text that fits the calibrator's window, and its length."""
    recent, ids = RecentDivergence(32), text(2, 3000)
    for end in range(2900, 3001):
        remember(recent, ids[:end])
    assert all(len(end) == 32 + 16 for _, end in recent._memo)


def test_a_large_prefill_runs_in_parts_and_keeps_little_memory(
    calibrator: Calibrator, session: CalibratorSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probs of the sixteen positions are freed after the call."""
    size = 2 * calibrator.vocabulary_size * 4
    monkeypatch.setattr("fusion_detox.decoding.session._FORWARD_BYTES", 20 * size)
    texts = [text(seed, 20) for seed in range(4)]
    sizes: list[int] = []
    inner = session._decoder.logits

    def logits(rows: Sequence[Row]) -> torch.Tensor:
        found = inner(rows)
        sizes.append(found.shape[1])
        return found

    monkeypatch.setattr(session._decoder, "logits", logits)
    reading = session.read([texts[0]], divergence_of=texts)
    assert sizes == [16, 16, 16, 16]
    assert session._memo.bytes == size
    for ids, found in zip(texts, reading.divergence, strict=True):
        assert found == pytest.approx(by_definition(calibrator, ids), rel=1e-4)


def test_one_call_equals_two_calls(session: CalibratorSession) -> None:
    texts = [text(seed, 25) for seed in range(3)]
    reading = session.read(texts, divergence_of=texts)
    session.reset()
    found = reading.values.rows(range(len(texts))).log()
    torch.testing.assert_close(found, session.log_probs(texts))
    assert reading.divergence == pytest.approx(session.recent_divergence(texts), rel=1e-4)


def test_an_unreferenced_session_is_freed_at_once(calibrator: Calibrator) -> None:
    """Its caches may fill a GPU, so it must not wait for the cycle collector."""
    session = CalibratorSession(calibrator, device=torch.device("cpu"))
    session.recent_divergence([text(1, 5)])
    gone = weakref.ref(session)
    gc.disable()
    try:
        del session
        assert gone() is None
    finally:
        gc.enable()


def test_threads_do_not_disturb_each_other(session: CalibratorSession) -> None:
    texts = [text(seed, 40) for seed in range(6)]
    wanted = {ids[:end]: 0.0 for ids in texts for end in range(20, 41)}
    for ids in wanted:
        (wanted[ids],) = session.recent_divergence([ids])
    session.reset()
    wrong: list[Ids] = []

    def write(ids: Ids) -> None:
        for end in range(20, 41):
            (found,) = session.recent_divergence([ids[:end]])
            if abs(found - wanted[ids[:end]]) > 1e-4:
                wrong.append(ids[:end])

    threads = [threading.Thread(target=write, args=(ids,)) for ids in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["byte_tokenizer", "other_tokenizer"])
@pytest.mark.parametrize("rule", ["contrast", "product", "mixture"])
def test_the_strength_follows_the_text(
    calibrator: Calibrator, request: pytest.FixtureRequest, name: str, rule: str
) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(name)
    config = FusionConfig(rule=rule, strength=0.8, plausibility=0.0)  # type: ignore[arg-type]
    plain = FusionLogitsProcessor(calibrator, tokenizer, config)
    ids = torch.tensor([tokenizer("You are a complete", add_special_tokens=False)["input_ids"]])
    scores = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(1))
    path = plain._context.read(tuple(ids[0].tolist())).path
    divergence = by_definition(calibrator, path)
    # The strength is full up to factor 1, and lower above it.
    for factor in (0.5, 1.0, 2.0, 5.0):
        adapted = plain.with_settings(context_kl=factor * divergence)
        fused, strength = adapted.with_strength(ids, scores)
        wanted = 0.8 * min(1.0, 1 / factor)
        assert float(strength) == pytest.approx(wanted, rel=1e-3)
        same = plain.with_settings(strength=wanted)(ids, scores)
        torch.testing.assert_close(fused, same, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(adapted(ids, scores), fused, atol=0, rtol=0)
    # Below the threshold, nothing changes; from there on, the strength grows in proportion.
    half = plain.with_settings(context_kl=1.5 * divergence, context_threshold=0.5 * divergence)
    assert float(half.with_strength(ids, scores)[1]) == pytest.approx(0.4, rel=1e-3)
    none = plain.with_settings(context_kl=3 * divergence, context_threshold=1.001 * divergence)
    fused, strength = none.with_strength(ids, scores)
    assert float(strength) == 0
    torch.testing.assert_close(fused, scores.log_softmax(-1))


def test_the_kl_budget_also_limits_full_strength(
    calibrator: Calibrator, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = FusionConfig(strength=4.0, plausibility=0.0, kl_budget=0.01)
    ids = torch.tensor([[40, 50, 60], [60, 50, 41]])
    scores = torch.randn(2, len(byte_tokenizer), generator=torch.Generator().manual_seed(2))
    processor = FusionLogitsProcessor(calibrator, byte_tokenizer, config)
    _, bound = processor.with_strength(ids, scores)
    _, same = processor.with_settings(context_kl=1e-6).with_strength(ids, scores)
    torch.testing.assert_close(bound, same)
    _, less = processor.with_settings(context_kl=1e6).with_strength(ids, scores)
    assert (bound > 0).all()
    assert (less < 1e-3 * bound).all()


def test_context_kl_needs_a_reference(
    calibrator: Calibrator, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = Calibrator(calibrator.clean, None, byte_tokenizer, context_length=32)
    config = FusionConfig(rule="product", strength=0.5, context_kl=0.1)
    with pytest.raises(ConfigError, match="context_kl compares the calibrator's two models"):
        FusionLogitsProcessor(alone, byte_tokenizer, config)
    with pytest.raises(ConfigError, match="context_kl compares"):  # nor as a recommended setting
        Calibrator(calibrator.clean, None, byte_tokenizer, config=config, context_length=32)


def test_the_threshold_must_be_below_the_divergence_of_full_strength() -> None:
    with pytest.raises(
        ConfigError, match=r"context_threshold is 0\.2, but must be below context_kl"
    ):
        FusionConfig(context_kl=0.2, context_threshold=0.2)
    with pytest.raises(ConfigError, match="context_threshold must be a number of at least 0"):
        FusionConfig(context_threshold=-1)
    assert "context_threshold" not in FusionConfig().to_dict()  # older versions can read it


@pytest.mark.parametrize("rule", ["contrast", "product"])
def test_what_lies_below_the_limit_counts_in_any_text(
    calibrator: Calibrator, byte_tokenizer: PreTrainedTokenizerFast, rule: str
) -> None:
    config = FusionConfig(rule=rule, strength=0.9, plausibility=0.0)  # type: ignore[arg-type]
    plain = FusionLogitsProcessor(calibrator, byte_tokenizer, config)
    ids = torch.tensor([[40, 50, 60], [60, 50, 41]])
    scores = torch.randn(2, len(byte_tokenizer), generator=torch.Generator().manual_seed(2))
    scores = scores.log_softmax(-1)
    closed = plain.with_settings(context_kl=1e9, context_threshold=1e8)
    _, strength = closed.with_settings(context_limit=0.0).with_strength(ids, scores)
    assert (strength == 0).all()
    if rule == "product":  # has no log-ratios
        torch.testing.assert_close(closed.with_settings(context_limit=0.0)(ids, scores), scores)
        return
    step = plain._step(ids.tolist(), scores, [0.9, 0.9], [0, 1])
    ratios = torch.zeros_like(scores).scatter(-1, step.chosen.tokens, step.shift(1.0))
    mapped = plain.vocabulary.mapped
    mass = scores[:, mapped].logsumexp(-1, keepdim=True)
    for limit in (0.0, 0.05, 0.2):
        always = (ratios + limit).clamp_max(0.0)
        assert (always < 0).any()
        moved = (scores + 0.9 * always)[:, mapped].log_softmax(-1) + mass
        wanted = scores.clone()
        wanted[:, mapped] = moved
        fused = closed.with_settings(context_limit=limit)(ids, scores)
        torch.testing.assert_close(fused, wanted, atol=1e-5, rtol=1e-5)
        open_ = plain.with_settings(context_kl=1e-6, context_limit=limit)
        torch.testing.assert_close(open_(ids, scores), plain(ids, scores), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "much", True])
def test_context_kl_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="context_kl must be a number above 0"):
        FusionConfig(context_kl=value)  # type: ignore[arg-type]
