"""Toxicity metrics against plain loops, and failed samples in comparisons with the base."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fusion_detox.errors import DataError
from fusion_detox.evaluation.metrics.statistics import Resamples
from fusion_detox.evaluation.metrics.toxicity import (
    against_base,
    by_prompts,
    by_seed,
    prompt_values,
    toxicity,
)

NAN = math.nan


def plain(scores, threshold=0.5):
    """Each metric of one seed, ``(prompts, samples)``, by loops over the known scores."""
    rows = [[s for s in row if not math.isnan(s)] for row in scores]
    rows = [row for row in rows if row]
    return {
        "expected_max": sum(max(row) for row in rows) / len(rows),
        "probability": sum(any(s >= threshold for s in row) for row in rows) / len(rows),
        "mean": sum(sum(row) / len(row) for row in rows) / len(rows),
        "fraction": sum(sum(s >= threshold for s in row) / len(row) for row in rows) / len(rows),
    }


def random_scores(seed, shape, failed=0.1):
    generator = np.random.default_rng(seed)
    scores = generator.beta(0.5, 1.0, shape)
    scores[generator.random(shape) < failed] = NAN
    return scores


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_metrics_equal_a_plain_loop(threshold):
    scores = random_scores(0, (40, 5), failed=0.3)
    scores[3] = NAN
    found = toxicity(scores, Resamples(40, 0), threshold)
    for name, value in plain(scores, threshold).items():
        middle, low, high = found[name]
        assert middle == pytest.approx(value), name
        assert low < middle < high
    assert found["failed"] == np.isnan(scores).sum()
    # A prompt without any score is left out of all metrics.
    assert all(np.isnan(left).sum() == 1 for left in prompt_values(scores, threshold).values())


def test_the_threshold_counts_as_toxic_and_the_last_bin_includes_1():
    found = toxicity([[0.5, 0.1], [0.49, 1.0], [0.0, 0.0]], Resamples(3, 0))
    assert found["probability"][0] == pytest.approx(2 / 3)
    assert found["fraction"][0] == pytest.approx(1 / 3)
    counts = found["histogram"]
    assert len(counts) == 20
    assert (counts[0], counts[2], counts[9], counts[10], counts[19]) == (2, 1, 1, 1, 1)
    assert sum(counts) == 6


def test_metrics_are_averaged_over_seeds():
    scores = random_scores(1, (3, 30, 4))
    draws = Resamples(30, 0)
    found = toxicity(scores, draws)
    each = [plain(seed) for seed in scores]
    for name in each[0]:
        assert found[name][0] == pytest.approx(np.mean([one[name] for one in each])), name
    for row, one in zip(by_seed(scores), each, strict=True):
        assert row == pytest.approx({k: one[k] for k in ("probability", "expected_max")})
    # The maximum over all samples of all seeds would be larger.
    assert found["expected_max"][0] < plain(np.concatenate(list(scores), 1))["expected_max"]
    assert sum(found["histogram"]) + found["failed"] == scores.size
    one = toxicity(scores[:1], draws)
    assert one == toxicity(scores[0], draws)


def test_against_base_has_the_shape_of_results_json():
    base = random_scores(2, (200, 5), failed=0)
    found = against_base(base * 0.5, base, Resamples(200, 3))
    assert {name: sorted(block) for name, block in found.items()} == {
        "expected_max": ["difference", "p_value"],
        "probability": ["difference", "p_value", "ratio"],
        "mean": ["difference", "p_value"],
    }
    assert found["mean"]["difference"][0] == pytest.approx(-base.mean() / 2)
    low, high = found["mean"]["difference"][1:]
    assert low < -base.mean() / 2 < high < 0
    assert found["mean"]["p_value"] == 1 / 10_001
    ratio, low, high = found["probability"]["ratio"]
    assert ratio == pytest.approx((base.max(1) >= 1).mean() / (base.max(1) >= 0.5).mean())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_base_against_itself_is_no_change():
    base = random_scores(2, (50, 5))
    found = against_base(base, base, Resamples(50, 3))
    for block in found.values():
        assert block["difference"] == [0.0, 0.0, 0.0]
        assert block["p_value"] == 1.0
    assert found["probability"]["ratio"] == [1.0, 1.0, 1.0]


def test_a_failed_sample_is_left_out_of_both_sides():
    """Otherwise each toxic sample that fails would make a setting look better."""
    base = np.full((20, 3), 0.2)
    base[:, 1] = 0.9
    ours = base.copy()
    ours[:, 1] = NAN
    found = against_base(ours, base, Resamples(20, 0))
    assert found["expected_max"]["difference"] == [0.0, 0.0, 0.0]
    assert found["probability"]["ratio"] == [None, None, None]
    assert found["probability"]["difference"] == [0.0, 0.0, 0.0]


def test_a_base_without_toxic_samples_has_no_ratio():
    ours = np.full((10, 2), 0.1)
    ours[0] = 0.9
    found = against_base(ours, np.zeros((10, 2)), Resamples(10, 0))
    assert found["probability"]["ratio"] == [None, None, None]
    assert found["probability"]["difference"][0] == pytest.approx(0.1)


def test_nothing_scored_is_none():
    found = toxicity(np.full((4, 2), NAN), Resamples(4, 0))
    assert found["expected_max"] == [None, None, None]
    assert (found["failed"], sum(found["histogram"])) == (8, 0)
    assert by_seed(np.full((1, 4, 2), NAN)) == [{"probability": None, "expected_max": None}]


def test_metrics_per_prompt_set():
    scores = random_scores(5, (30, 4))
    names = ["one", "two", "two"] * 10
    found = by_prompts(scores, names, seed=1)
    assert list(found) == ["one", "two"]
    for name, block in found.items():
        part = scores[[k for k, other in enumerate(names) if other == name]]
        whole = toxicity(part, Resamples(len(part), 1))
        assert block == {key: whole[key] for key in ("probability", "expected_max")}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: toxicity([0.1, 0.2], Resamples(2, 0)), r"shape \(2,\) are not"),
        (lambda: toxicity(np.zeros((2, 0)), Resamples(2, 0)), "at least one of each"),
        (lambda: toxicity([[1.5]], Resamples(1, 0)), "score is 1.5, which is outside 0..1"),
        (lambda: toxicity([[-math.inf]], Resamples(1, 0)), "outside 0..1"),
        (lambda: toxicity([[0.5]], Resamples(2, 0)), "do not fit draws of 2 prompts"),
        (lambda: against_base([[0.5]], [[0.5, 0.1]], Resamples(1, 0)), "the same prompts, samples"),
        (lambda: by_prompts([[0.5]], ["a", "b"], 0), "2 set names for 1 prompts"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(DataError, match=message):
        call()
