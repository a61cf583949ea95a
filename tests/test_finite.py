"""Fused log-probs are finite for every finite input, and settings that overflow are refused."""

import math
import random

import pytest
import torch

from fusion_detox.config import FusionConfig, check_number
from fusion_detox.errors import ConfigError, DataError
from fusion_detox.fusion import fuse, prepare_aligned
from fusion_detox.generation.sampling import Sampling

RULES = ("contrast", "product", "mixture", "aligned", "aligned_contrast")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH, ROWS = 12, 4


def extreme_scores(rng, dtype):
    """Finite scores of all sizes, with some of -inf."""
    info = torch.finfo(dtype)
    sizes = (1e-30, 1e-3, 1.0, 30.0, 1e3, 6e4, info.max / 3, info.max)
    values = [rng.uniform(-1, 1) * min(rng.choice(sizes), info.max) for _ in range(ROWS * WIDTH)]
    scores = torch.tensor(values, dtype=torch.float64).clamp(info.min, info.max).to(dtype)
    scores = scores.view(ROWS, WIDTH)
    scores[torch.rand(ROWS, WIDTH) < rng.choice((0.0, 0.3, 0.9))] = -math.inf
    scores[:, rng.randrange(WIDTH)] = rng.uniform(-5, 5)  # at least one token is possible
    return scores


def extreme_probs(rng):
    """Distributions with exact zeros, ones and subnormal numbers."""
    sizes = (0.0, 1e-45, 1e-38, 1e-7, 0.5, 1.0)
    probs = torch.tensor([[rng.choice(sizes) for _ in range(WIDTH)] for _ in range(ROWS)])
    return probs / probs.sum(-1, keepdim=True).clamp_min(1.0)


def extreme_config(rng, rule):
    contrasts = rule in ("contrast", "aligned_contrast")
    return FusionConfig(
        rule=rule,
        strength=rng.choice((1e-30, 0.5, 1.0, *((2.5, 300.0, 1e4) if contrasts else ()))),
        plausibility=rng.choice((0.0, 1e-3, 1.0)),
        outside=rng.choice(("keep", "remove")),
        clip=rng.choice((1e-30, 3.0, 1e4, math.inf)),
        threshold=rng.choice((0.0, 0.1, 1e4)),
        floor=rng.choice((0.0, 1e-7, 1e-2)),
        kl_budget=rng.choice((None, 1e-30, 0.1, 1e4)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_fused_log_probs_are_finite_for_every_finite_input(rule, dtype):
    rng = random.Random(f"{rule} {dtype}")
    torch.manual_seed(7)
    removed = 0
    for case in range(300):
        config, scores, scale = extreme_config(rng, rule), extreme_scores(rng, dtype), None
        if rng.random() < 0.3:
            scale = torch.tensor([0.0, 1e-30, 0.5, 1.0])
        mapped = torch.rand(WIDTH) < rng.choice((0.0, 0.5, 1.0))
        if rule == "aligned":
            sizes = (1.0, 1e3, 1e30, 3e38)
            projected = (torch.rand(ROWS, WIDTH) * 2 - 1) * rng.choice(sizes)
            cap = rng.choice((None, 0.5, 30.0))
            step = prepare_aligned(scores, projected, mapped, cap, config, scale)
            fused = step.fused()
            assert bool(torch.isfinite(step.strength()).all())
        else:
            fused = fuse(scores, extreme_probs(rng), extreme_probs(rng), mapped, config, scale)
        assert fused.dtype == dtype
        finite, forbidden = torch.isfinite(fused), torch.isneginf(fused)
        where = f"case {case}: {config}"
        assert bool((finite | forbidden).all()), where
        if config.outside == "remove":
            assert bool((forbidden >= torch.isneginf(scores)).all()), where
            extra = forbidden & ~torch.isneginf(scores)
            assert bool((extra <= mapped).all()), where
            removed += int(extra.sum())
        else:
            assert torch.equal(forbidden, torch.isneginf(scores)), where
        if rule != "aligned":  # its sums of 1e30 and more are rounded
            total = torch.logsumexp(fused.float(), -1)
            assert bool((total.abs() < 0.1).all()), where
    assert removed > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 1e308}, r"clip is 1e\+308, but numbers above 10000 overflow: use a smaller one"),
        ({"strength": 1e300}, r"strength is 1e\+300, but numbers above 10000 overflow"),
        ({"strength": 10**400}, "strength is a number of hundreds of digits, but"),
        ({"strength": 10**5000}, "strength is a number of hundreds of digits, but"),
        ({"strength": -(10**5000)}, "strength must be a number of at least 0, but is a number of"),
        ({"threshold": 1e308}, "threshold is"),
        ({"kl_budget": 1e308}, "kl_budget is"),
        ({"context_kl": 1e39}, "context_kl is"),
        ({"context_threshold": 1e39, "context_kl": 1.0}, "context_threshold is"),
        ({"strength": math.inf}, "strength must be a number"),
        ({"clip": math.nan}, "clip must be a number above 0, but is nan"),
    ],
)
def test_settings_that_overflow_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        FusionConfig(**changes)


def test_every_number_of_every_setting_has_a_largest():
    for name, value, whole in (
        ("rate", 1e39, False),
        ("steps", 1 << 63, True),
        ("n", 10**5000, True),
    ):
        with pytest.raises(ConfigError, match=rf"{name} is .*, but numbers above .* overflow"):
            check_number(name, value, 0, whole=whole)
    check_number("seed", (1 << 63) - 1, 0, whole=True)
    check_number("clip", math.inf, 0, finite=False)
    for temperature in (1e-300, 1e30):
        with pytest.raises(ConfigError, match=r"temperature must be a number of at least 0\.0001"):
            Sampling(temperature=temperature)


def test_rows_are_not_broadcast():
    scores, one = torch.zeros(3, WIDTH), torch.full((1, WIDTH), 1 / WIDTH)
    with pytest.raises(DataError, match=r"shape \(1, 12\) came with scores of shape \(3, 12\)"):
        fuse(scores, one, one, torch.ones(WIDTH, dtype=torch.bool), FusionConfig())
    none = torch.zeros(0, WIDTH)
    assert fuse(none, none, none, torch.ones(WIDTH, dtype=torch.bool), FusionConfig()).shape == (
        0,
        12,
    )
