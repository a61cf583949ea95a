"""Perplexity ratios of groups against values known by construction, paired and unpaired."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fusion_detox.errors import DataError
from fusion_detox.evaluation.metrics.groups import groups
from fusion_detox.evaluation.metrics.harmless import TextChange


def text(base, change, tokens=10):
    """A text of ``base`` nats per token, to which fusion adds ``change`` nats per token."""
    each = np.full(tokens, float(base))
    flat = np.zeros(tokens)
    return TextChange(flat, flat > 0, each, each + change, flat)


def suite(texts=40, seed=0):
    """Pairs whose change varies widely, with a difference of 0.1 nats between the groups."""
    generator = np.random.default_rng(seed)
    changes, names, pairs = [], [], []
    for pair, own in enumerate(generator.normal(0.3, 0.3, texts)):
        changes += [text(3.0, own + 0.1), text(2.0, own)]
        names += ["women", "men"]
        pairs += [pair, pair]
    return changes, names, pairs


def test_ratio_against_the_control_by_hand():
    changes = [text(3.0, 0.5, 4), text(3.0, 0.1, 12), text(2.0, 0.2, 5), text(9.0, 9.0, 3)]
    names = ["one", "one", "control", "other"]
    found = groups("s", changes, names, 0, control="control")
    assert [row["group"] for row in found] == ["one", "control", "other"]
    one = found[0]
    assert (one["suite"], one["texts"], one["tokens"]) == ("s", 2, 16)
    assert one["loss_base"] == pytest.approx(3.0)
    mean = (4 * 0.5 + 12 * 0.1) / 16
    assert one["loss_fused"] == pytest.approx(3.0 + mean)
    assert one["change"] == pytest.approx([mean, 0.1, 0.5])
    # The ratio of two perplexity ratios exp(fused - base).
    ratio = math.exp(3.0 + mean) / math.exp(3.0) / (math.exp(2.2) / math.exp(2.0))
    assert one["ratio"] == [pytest.approx(ratio), None, None]
    assert found[1]["ratio"] == [1.0, None, None]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_pairs_cancel_what_both_texts_share():
    changes, names, pairs = suite()
    apart = groups("s", changes, names, 0, control="men")[0]["ratio"]
    tied = groups("s", changes, names, 0, control="men", pairs=pairs)[0]["ratio"]
    assert tied == pytest.approx([math.exp(0.1)] * 3)
    assert apart[0] == pytest.approx(tied[0])
    assert apart[1] < 1 < apart[2]


def test_texts_without_a_partner_count_only_for_the_change():
    changes, names, pairs = suite(10)
    changes += [text(3.0, 5.0)]
    names, pairs = [*names, "women"], [*pairs, None]
    women = groups("s", changes, names, 0, control="men", pairs=pairs)[0]
    assert women["texts"] == 11
    assert women["change"][0] > 0.5
    assert women["ratio"][0] == pytest.approx(math.exp(0.1))
    # Several texts of one pair are pooled.
    double = groups("s", [*changes, text(3.0, 0.0)], [*names, "women"], 0,
                    control="men", pairs=[*pairs, 0])[0]  # fmt: skip
    assert double["ratio"][0] < women["ratio"][0]
    # A group without any partner is compared as a whole.
    loose = groups("s", changes, names, 0, control="men", pairs=[None] * len(pairs))[0]
    assert loose["ratio"] == groups("s", changes, names, 0, control="men")[0]["ratio"]


def test_unpaired_intervals_cover_the_true_value():
    generator, held = np.random.default_rng(1), 0
    for trial in range(150):
        changes = [text(3.0, c) for c in generator.normal(0.3, 0.2, 40)]
        changes += [text(3.0, c) for c in generator.normal(0.2, 0.2, 40)]
        found = groups("s", changes, ["a"] * 40 + ["b"] * 40, trial, control="b", count=300)
        _, low, high = found[0]["ratio"]
        held += low <= math.exp(0.1) <= high
    assert 134 <= held <= 149


def test_without_a_control_or_tokens_there_are_no_ratios():
    found = groups("s", [text(3.0, 0.1), text(3.0, 0.1, 0)], ["a", "b"], 0)
    assert [row["ratio"] for row in found] == [None, None]
    assert found[1]["texts"] == found[1]["tokens"] == 0
    assert found[1]["loss_base"] is None
    assert found[1]["change"] == [None, None, None]
    against = groups("s", [text(3.0, 0.1), text(3.0, 0.1, 0)], ["a", "b"], 0, control="b")
    assert against[0]["ratio"] == [None, None, None]


def test_tokens_without_probability_are_counted():
    banned = text(3.0, 0.1)
    banned.loss_fused[2] = math.inf
    found = groups("s", [banned, text(3.0, 0.1)], ["a", "b"], 0, control="b")
    assert found[0]["ratio"] == found[0]["change"] == [None, None, None]
    assert (found[0]["loss_fused"], found[0]["impossible"]) == (None, 1)
    assert found[1]["impossible"] == 0


def test_invalid_arguments_raise():
    changes, names, pairs = suite(2)
    with pytest.raises(DataError, match=r"no text of the control group 'man'.*men, women"):
        groups("s", changes, names, 0, control="man")
    with pytest.raises(DataError, match="4 texts with 3 group names and no pairs"):
        groups("s", changes, names[:3], 0)
    with pytest.raises(DataError, match="and 1 pairs"):
        groups("s", changes, names, 0, pairs=pairs[:1])
