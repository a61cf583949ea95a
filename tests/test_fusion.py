"""The rules equal their definitions, written out here in float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError
from fusion_detox.fusion import fuse, kl_divergence, log_ratio

VOCABULARY = 40
RULES = [
    FusionConfig(),
    FusionConfig(strength=2.5, threshold=0.3, clip=1.5),
    FusionConfig(outside="remove", plausibility=0.05),
    FusionConfig(kl_budget=0.05, strength=3.0),
    FusionConfig(rule="product", strength=0.4),
    FusionConfig(rule="mixture", strength=0.4, plausibility=0.0),
]


def case(seed: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, VOCABULARY, generator=generator) * 3
    clean = torch.softmax(torch.randn(rows, VOCABULARY, generator=generator) * 2, -1)
    reference = torch.softmax(torch.randn(rows, VOCABULARY, generator=generator) * 2, -1)
    mapped = torch.ones(VOCABULARY, dtype=torch.bool)
    mapped[-3:] = False
    return scores, clean, reference, mapped


def test_strength_zero_returns_the_same_object() -> None:
    scores, clean, reference, mapped = case(0)
    for rule in ("contrast", "product", "mixture"):
        assert fuse(scores, clean, reference, mapped, FusionConfig(rule=rule, strength=0)) is scores


@pytest.mark.parametrize("config", RULES, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_rule_is_normalised_and_leaves_unmapped_tokens(
    config: FusionConfig, seed: int
) -> None:
    scores, clean, reference, mapped = case(seed)
    before = scores.clone()
    fused = fuse(scores, clean, reference, mapped, config)
    assert torch.equal(scores, before)
    assert fused.exp().sum(-1) == pytest.approx([1.0] * 3, abs=1e-5)
    own = torch.log_softmax(scores, -1)
    torch.testing.assert_close(fused[:, ~mapped], own[:, ~mapped])


@pytest.mark.parametrize("config", RULES, ids=str)
def test_without_candidates_the_target_stays_normalised(config: FusionConfig) -> None:
    """A row whose only plausible tokens are special must not come back as raw logits."""
    scores, clean, reference, mapped = case(8)
    scores[1, -1] = 200.0
    fused = fuse(scores, clean, reference, mapped, config.replace(plausibility=0.05))
    torch.testing.assert_close(fused[1], torch.log_softmax(scores[1], -1))


@pytest.mark.parametrize("config", RULES, ids=str)
def test_minus_infinity_and_nan(config: FusionConfig) -> None:
    scores, clean, reference, mapped = case(3, rows=4)
    scores[0, 5:30] = -math.inf
    scores[1] = -math.inf
    scores[1, 7] = 2.0
    scores[2, 4] = math.nan
    fused = fuse(scores, clean, reference, mapped, config)
    assert torch.isinf(fused[0, 5:30]).all()
    if config.outside == "keep":
        assert torch.isfinite(fused[0, :5]).all()
        assert torch.isfinite(fused[0, 30:]).all()
    assert fused[1, 7] == pytest.approx(0.0, abs=1e-6)
    assert torch.isinf(fused[1]).sum() == VOCABULARY - 1
    torch.testing.assert_close(fused[2], scores[2], equal_nan=True)
    assert torch.isfinite(fused[3]).any()


@pytest.mark.parametrize("config", RULES, ids=str)
def test_rows_are_independent(config: FusionConfig) -> None:
    scores, clean, reference, mapped = case(4, rows=5)
    together = fuse(scores, clean, reference, mapped, config)
    for row in range(5):
        one = slice(row, row + 1)
        alone = fuse(scores[one], clean[one], reference[one], mapped, config)
        torch.testing.assert_close(together[one], alone)


def test_contrast_equals_its_definition() -> None:
    scores, clean, reference, mapped = case(5)
    config = FusionConfig(strength=1.7, plausibility=0.01, clip=2.0, threshold=0.2, floor=1e-6)
    fused = fuse(scores, clean, reference, mapped, config).double()
    for row in range(3):
        p = torch.softmax(scores[row].double(), -1)
        judged = [
            v for v in range(VOCABULARY) if mapped[v] and p[v] >= 0.01 * p.max() * math.exp(-0.5)
        ]
        step, share = {}, {}
        for v in judged:
            ratio = math.log((float(clean[row, v]) + 1e-6) / (float(reference[row, v]) + 1e-6))
            shrunk = math.copysign(max(abs(ratio) - 0.2, 0.0), ratio)
            step[v] = 1.7 * max(-2.0, min(2.0, shrunk))
            share[v] = min(1.0, math.log(float(p[v] / p.max()) / 0.01) + 0.5)
        assert 0 < min(share.values()) < 0.9
        group = sum(float(p[v]) for v in judged)

        low, high = -50.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            moved = {v: float(p[v]) * math.exp(share[v] * (step[v] + middle)) for v in judged}
            low, high = (middle, high) if sum(moved.values()) < group else (low, middle)
        for v in range(VOCABULARY):
            wanted = moved.get(v, float(p[v]))
            assert fused[row, v].exp() == pytest.approx(wanted, rel=2e-5, abs=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        FusionConfig(strength=4.0, plausibility=0.02),
        FusionConfig(strength=4.0, plausibility=0.02, kl_budget=0.3),
        FusionConfig(rule="product", strength=0.9, plausibility=0.02),
        FusionConfig(rule="mixture", strength=0.9, plausibility=0.1),
    ],
    ids=str,
)
def test_nearby_scores_give_nearby_results(config: FusionConfig) -> None:
    """Rounding the scores must not move a token across an edge and so by its whole shift."""
    for seed in range(20):
        scores, clean, reference, mapped = case(seed, rows=8)
        noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed))
        fused = fuse(scores, clean, reference, mapped, config)
        largest = float((fused - scores.log_softmax(-1)).abs().max())
        assert largest > 0.5
        slope = 4 * (1 + largest) / min(1.0, -math.log(config.plausibility))
        for size in (1e-3, 1e-2):
            near = scores + size * noise.clamp(-1, 1)
            moved = (fuse(near, clean, reference, mapped, config) - fused).abs().max()
            assert moved < size * slope


def test_the_share_grows_around_the_limit() -> None:
    """From half a nat below the limit of plausibility to half a nat above, to the whole shift."""
    scores = torch.tensor([[0.0, -3.49, -3.0, -2.51, -1.0, -3.51]])
    clean, mapped = torch.full((1, 6), 1e-3), torch.ones(6, dtype=torch.bool)
    reference = clean * math.e
    reference[0, 0] = 1e-3
    config = FusionConfig(strength=2.0, plausibility=math.exp(-3.0), clip=5.0, floor=0.0)
    fused = fuse(scores, clean, reference, mapped, config)
    moved = (fused - scores.log_softmax(-1))[0]
    constant = float(moved[0])  # its log-ratio is 0
    wanted = [share * (constant - 2.0) for share in (0.01, 0.5, 0.99, 1.0)]
    assert moved[1:5].tolist() == pytest.approx(wanted, abs=1e-5)
    assert float(moved[5]) == pytest.approx(0.0, abs=1e-6)
    assert float(fused.logsumexp(-1)) == pytest.approx(0.0, abs=1e-6)
    hard = fuse(scores, clean, reference, mapped, config.replace(outside="remove"))
    assert hard[0].isneginf().tolist() == [False, True, False, False, False, True]


@pytest.mark.parametrize("config", RULES, ids=str)
def test_a_cap_on_candidates(config: FusionConfig) -> None:
    scores, clean, reference, mapped = case(7, rows=4)
    scores[2] = 0.0  # all are as probable
    scores[3, 6:] = -60.0
    whole = fuse(scores, clean, reference, mapped, config)
    wide = fuse(scores, clean, reference, mapped, config.replace(max_candidates=VOCABULARY))
    assert torch.equal(whole, wide)
    own = scores.log_softmax(-1)
    for cap in (1, 5, 17):
        fused = fuse(scores, clean, reference, mapped, config.replace(max_candidates=cap))
        assert fused.logsumexp(-1).tolist() == pytest.approx([0.0] * 4, abs=1e-4)
        changed = ((fused - own).abs() > 1e-5) & ~fused.isneginf()
        if config.outside == "keep":
            assert (changed.sum(-1) <= cap).all()
        assert changed.any() == (cap > 1 or config.outside == "remove")


def test_a_cap_is_soft_too() -> None:
    """Scores that change which token is the last within the cap change little."""
    config = FusionConfig(strength=4.0, plausibility=1e-3, max_candidates=9)
    for seed in range(20):
        scores, clean, reference, mapped = case(seed, rows=8)
        noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed))
        fused = fuse(scores, clean, reference, mapped, config)
        near = fuse(scores + 1e-3 * noise.clamp(-1, 1), clean, reference, mapped, config)
        assert (near - fused).abs().max() < 0.1


def test_product_and_mixture_equal_their_definitions() -> None:
    scores, clean, _reference, _ = case(6)
    mapped = torch.ones(VOCABULARY, dtype=torch.bool)
    p = torch.softmax(scores, -1)
    mixture = FusionConfig(rule="mixture", strength=0.3, plausibility=0.0)
    torch.testing.assert_close(
        fuse(scores, clean, None, mapped, mixture).exp(), 0.7 * p + 0.3 * clean
    )
    product = FusionConfig(rule="product", strength=0.3, plausibility=0.0, floor=0.0)
    torch.testing.assert_close(
        fuse(scores, clean, None, mapped, product),
        torch.log_softmax(0.7 * p.log() + 0.3 * clean.log(), -1),
    )


@pytest.mark.parametrize(
    "config",
    [
        FusionConfig(strength=4.0, clip=math.inf),
        FusionConfig(rule="product", strength=1.0, plausibility=0.0),
        FusionConfig(rule="mixture", strength=1.0, plausibility=1e-3),
    ],
    ids=["contrast", "product", "mixture"],
)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.floats(0.001, 1.0))
def test_kl_budget_is_respected_at_every_step_and_fully_used(
    config: FusionConfig, seed: int, budget: float
) -> None:
    scores, clean, reference, mapped = case(seed)
    config = config.replace(kl_budget=budget)
    target = torch.log_softmax(scores, -1)
    spent = kl_divergence(fuse(scores, clean, reference, mapped, config), target)
    free = kl_divergence(
        fuse(scores, clean, reference, mapped, config.replace(kl_budget=None)), target
    )
    for row in range(3):
        wanted = min(budget, float(free[row]))
        assert float(spent[row]) <= budget * 1.001 + 1e-5
        assert float(spent[row]) == pytest.approx(wanted, rel=0.02, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.floats(0.001, 1.0))
def test_kl_budget_includes_removed_tokens(seed: int, budget: float) -> None:
    """Removal alone costs KL; if that exceeds the budget, the tokens stay."""
    scores, clean, reference, mapped = case(seed)
    config = FusionConfig(outside="remove", plausibility=0.05, strength=3.0, kl_budget=budget)
    fused = fuse(scores, clean, reference, mapped, config)
    spent = kl_divergence(fused, torch.log_softmax(scores, -1))
    assert float(spent.max()) <= budget * 1.001 + 1e-5
    torch.testing.assert_close(fused.exp().sum(-1), torch.ones(3))


@pytest.mark.parametrize("rule", ["mixture", "product"])
def test_kl_budget_includes_tokens_that_the_target_finds_impossible(rule: str) -> None:
    """At 120 nats below the best, a probability is 0 in float32, but mixing makes it positive."""
    scores, clean, reference, mapped = case(3)
    scores[:, 5] = scores.amax(-1) - 120.0
    clean = torch.full_like(clean, 1e-6)
    clean[:, 5] = 1.0
    clean = clean / clean.sum(-1, keepdim=True)
    config = FusionConfig(rule=rule, strength=0.9, plausibility=0.0, kl_budget=0.5)  # type: ignore[arg-type]
    fused = fuse(scores, clean, reference, mapped, config)
    spent = kl_divergence(fused.double(), torch.log_softmax(scores.double(), -1))
    assert float(spent.max()) <= 0.5 * 1.01


def test_log_ratio_ignores_tokens_that_both_models_find_impossible() -> None:
    tiny = torch.tensor([1e-12, 1e-3]), torch.tensor([1e-9, 1e-1])
    ratio = log_ratio(*tiny, FusionConfig(floor=1e-6, clip=math.inf))
    assert abs(float(ratio[0])) < 0.01
    assert float(ratio[1]) == pytest.approx(math.log(1e-2), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    scores, clean, reference, mapped = case(7)
    assert fuse(scores.to(dtype), clean, reference, mapped, FusionConfig()).dtype == dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": -1}, "strength must be a number of at least 0, but is -1"),
        ({"strength": math.nan}, "strength must be a number of at least 0, but is nan"),
        ({"strength": "big"}, "but is 'big'"),
        ({"rule": "mixture", "strength": 1.5}, "at most 1, but is 1.5 .rule 'mixture'."),
        (
            {"rule": "sum"},
            "rule must be one of contrast, product, mixture, aligned, aligned_contrast, not 'sum'",
        ),
        ({"plausibility": 2}, "plausibility must be a number of at least 0 and at most 1"),
        ({"clip": 0}, "clip must be a number above 0, but is 0"),
        ({"kl_budget": 0}, "kl_budget must be a number above 0, but is 0"),
        ({"outside": "drop"}, "outside must be one of keep, remove, not 'drop'"),
        ({"stength": 1}, "unknown fusion settings: stength; the known ones are rule, strength"),
    ],
)
def test_wrong_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FusionConfig().replace(**changes)


def test_settings_survive_json() -> None:
    config = FusionConfig(clip=math.inf, kl_budget=0.5)
    assert FusionConfig.from_dict(config.to_dict()) == config
