"""Intervals and p-values against scipy, plain loops and simulations with known truth."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from fusion_detox.errors import ConfigError, DataError
from fusion_detox.evaluation.metrics import statistics
from fusion_detox.evaluation.metrics.statistics import (
    Resamples,
    compare,
    exp_ratio_interval,
    finite,
    mean_interval,
    missing,
    ratio_interval,
    sign_flip_p_value,
)

RNG = np.random.default_rng


def drawn(prompts: int, seed: int, count: int) -> np.ndarray:
    return RNG(seed).integers(0, prompts, (count, prompts))


def test_mean_interval_equals_a_plain_percentile_bootstrap():
    values = RNG(3).gamma(2.0, size=50)
    means = [values[row].mean() for row in drawn(50, 7, 400)]
    wanted = [values.mean(), *np.percentile(means, [2.5, 97.5])]
    assert mean_interval(values, Resamples(50, 7, 400)) == pytest.approx(wanted, rel=1e-12)


def test_interval_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = RNG(0).normal(3.0, 2.0, 80)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=RNG(1)
    ).confidence_interval
    _, low, high = mean_interval(values, Resamples(80, 2, 20_000))
    spread = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.03 * spread)
    assert high == pytest.approx(theirs.high, abs=0.03 * spread)


def test_intervals_have_their_nominal_coverage():
    generator, held = RNG(5), 0
    for trial in range(300):
        _, low, high = mean_interval(generator.normal(1.0, 1.0, 60), Resamples(60, trial, 300))
        held += low <= 1.0 <= high
    # 0.95 of 300, with a standard error of 3.8; slightly fewer, as usual for this method.
    assert 270 <= held <= 296


def test_ratios_are_of_sums_over_prompts():
    above, below = RNG(1).gamma(3.0, size=30), RNG(2).integers(1, 40, 30).astype(float)
    rows = drawn(30, 4, 500)
    ratios = [above[row].sum() / below[row].sum() for row in rows]
    draws = Resamples(30, 4, 500)
    wanted = [above.sum() / below.sum(), *np.percentile(ratios, [2.5, 97.5])]
    assert ratio_interval(above, below, draws) == pytest.approx(wanted)
    wanted = [np.exp(above.sum() / below.sum()), *np.percentile(np.exp(ratios), [2.5, 97.5])]
    assert exp_ratio_interval(above, below, draws) == pytest.approx(wanted)


def test_draws_do_not_depend_on_the_size_of_a_block(monkeypatch):
    values = RNG(1).normal(size=37)
    whole = mean_interval(values, Resamples(37, 0, 100))
    p_value = sign_flip_p_value(values, 0, 500)
    monkeypatch.setattr(statistics, "_BLOCK", 80)
    assert mean_interval(values, Resamples(37, 0, 100)) == pytest.approx(whole, rel=1e-13)
    assert sign_flip_p_value(values, 0, 500) == p_value


def test_many_prompts_need_little_memory():
    values = RNG(1).normal(size=100_000)
    tracemalloc.start()
    try:
        mean_interval(values, Resamples(100_000, 0, 100))
        sign_flip_p_value(values, 0, 100)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_nan_prompts_are_left_out_and_counted():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    value, low, high = mean_interval(values, Resamples(4, 0))
    assert value == 3.0
    assert 1.0 <= low < 3.0 < high <= 5.0
    assert missing(values) == 1
    assert missing(np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, 0.0]])) == 2


def test_undefined_values_are_none():
    draws = Resamples(3, 0)
    assert mean_interval([np.nan] * 3, draws) == [None, None, None]
    assert mean_interval([np.nan, 2.0, np.nan], draws) == [2.0, None, None]
    assert ratio_interval([1.0, 2.0, 3.0], [0.0] * 3, draws) == [None, None, None]
    assert exp_ratio_interval([np.inf, 2.0, 3.0], [1.0] * 3, draws) == [None, None, None]
    assert exp_ratio_interval([5000.0, 2.0, 3.0], [1.0] * 3, draws) == [None, None, None]
    assert (finite(float("nan")), finite(float("-inf")), finite(2)) == (None, None, 2.0)


def test_a_ratio_over_a_rare_event_has_no_upper_bound():
    """A third of the resamples have no event in the base: an infinite ratio, not a missing one."""
    value, low, high = ratio_interval([1.0] * 40, [1.0] + [0.0] * 39, Resamples(40, 0))
    assert value == 40.0
    assert high is None
    assert low == pytest.approx(40 / 3, abs=4)


def test_compare_is_paired():
    base = RNG(0).uniform(size=60)
    other = base - 0.05 + RNG(1).normal(0, 0.01, 60)
    base[4] = other[9] = np.nan
    found = compare(base, other, Resamples(60, 1, 500))
    keep = ~(np.isnan(base) | np.isnan(other))
    assert (found.prompts, found.left_out) == (58, 2)
    assert found.difference[0] == pytest.approx((other - base)[keep].mean())
    assert found.ratio[0] == pytest.approx(other[keep].mean() / base[keep].mean())
    # The intervals overlap widely, but the difference is clear.
    assert found.difference[2] < 0
    assert found.ratio[2] < 1
    assert found.p_value == 1 / 10_001


def test_interval_of_a_difference_equals_a_plain_loop():
    base, other = RNG(0).uniform(size=20), RNG(1).uniform(size=20)
    rows = drawn(20, 6, 300)
    found = compare(base, other, Resamples(20, 6, 300))
    differences = [(other - base)[row].mean() for row in rows]
    ratios = [other[row].mean() / base[row].mean() for row in rows]
    assert found.difference[1:] == pytest.approx(np.percentile(differences, [2.5, 97.5]).tolist())
    assert found.ratio[1:] == pytest.approx(np.percentile(ratios, [2.5, 97.5]).tolist())


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_exact_p_value_counts_every_pattern(size):
    for seed in range(5):
        values = RNG(seed).normal(0.4, 1.0, size)
        sums = [
            abs(np.dot(signs, values)) for signs in itertools.product([-1, 1], repeat=len(values))
        ]
        wanted = np.mean(np.array(sums) >= abs(values.sum()) - 1e-12)
        assert sign_flip_p_value(values, 0) == wanted


def test_p_values_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")

    def statistic(one, axis):
        return np.mean(one, axis=axis)

    for size, shift in ((10, 0.5), (40, 0.3), (40, 0.05)):
        values = RNG(size).normal(shift, 1.0, size)
        theirs = stats.permutation_test(
            (values,), statistic, permutation_type="samples", n_resamples=20_000, rng=RNG(1)
        ).pvalue
        assert sign_flip_p_value(values, 2) == pytest.approx(theirs, abs=0.015)


def test_p_values_of_no_effect_are_uniform():
    generator = RNG(11)
    found = [sign_flip_p_value(generator.normal(size=30), k, 400) for k in range(400)]
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


def test_p_value_edge_cases():
    assert sign_flip_p_value([], 0) is None
    assert sign_flip_p_value([np.nan], 0) is None
    assert sign_flip_p_value([0.0, 0.0], 0) == 1.0
    # 0 has no sign: three prompts in one direction give p = 2/8, with any number of ties.
    assert sign_flip_p_value([1.0, 1.0, 1.0, *[0.0] * 50], 0) == 0.25
    assert sign_flip_p_value([0.1] * 3 + [-0.3], 0) == 1.0
    assert sign_flip_p_value(np.ones(200), 0, 1000) == 1 / 1001


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Resamples(0, 0), DataError, "no prompts to draw from"),
        (lambda: Resamples(3, 0, 0), ConfigError, "count must be a .* at least 1, but is 0"),
        (lambda: Resamples(3, -1), ConfigError, "seed must be a .* at least 0, but is -1"),
        (lambda: mean_interval([1.0], Resamples(2, 0)), DataError, "do not fit draws of 2"),
        (lambda: compare([1.0], [1.0, 2.0], Resamples(2, 0)), DataError, "on the same prompts"),
    ],
)  # fmt: skip
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
