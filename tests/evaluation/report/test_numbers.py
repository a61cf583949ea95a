"""How numbers are written, and which state a difference has."""

import math

import pytest

from fusion_detox.evaluation.report.findings import state
from fusion_detox.evaluation.report.numbers import change, p_text, percent, quantity
from fusion_detox.evaluation.report.reading import Interval, interval


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(Interval(0.112, 0.089, 0.139)), ("11 %", "9 to 14")),
        (percent(Interval(0.003, 0.001, 0.006)), ("0.3 %", "0.1 to 0.6")),
        (percent(Interval(0.0)), ("0 %", None)),
        (quantity(Interval(0.0418, 0.039, 0.045)), ("0.042", "0.039 to 0.045")),
        (quantity(Interval(114.31, 110.2, 118.5)), ("114", "110 to 119")),
        (quantity(Interval(12345.6, None, 3.0), 0), ("12,346", None)),
        (quantity(Interval(-0.0001), 2), ("0.00", None)),
        (percent(Interval(0.625, 0.45, 0.775)), ("63 %", "45 to 78")),
        (percent(Interval(0.275, 0.15, 0.425)), ("28 %", "15 to 43")),
        (quantity(Interval(1e30), 0), ("1,000,000,000,000,000,019,884,624,838,656", None)),
        (change(Interval(1.0975, 1.08, 1.11)), ("+10 %", "+8 to +11")),
        (change(Interval(0.9)), ("−10.0 %", None)),
    ],
)
def test_numbers_show_the_digits_that_their_interval_supports(shown, expected):
    assert (shown.value.replace("\u202f", " "), shown.ends) == expected


def test_p_values():
    shown = [p_text(p) for p in (0.00001, 0.0001, 0.0314, 0.41, 1.0)]
    assert shown == ["p < 0.0001", "p = 0.0001", "p = 0.031", "p = 0.41", "p = 1.00"]


@pytest.mark.parametrize(
    ("difference", "p_value", "equal", "expected"),
    [
        ([-0.1, -0.2, -0.05], None, 0, "lower"),
        ([0.1, 0.05, 0.2], 0.04, 0, "higher"),
        ([1.1, 1.05, 1.2], None, 1, "higher"),
        ([1.1, 1.0, 1.2], None, 1, "no clear difference"),
        ([-0.1, -0.2, -0.05], 0.06, 0, "no clear difference"),
        ([-0.1, -0.2, 0.01], 0.04, 0, "no clear difference"),
        ([0.0, None, None], 0.04, 0, "no clear difference"),
        ([-0.1, None, None], 0.04, 0, "lower"),
        ([-0.1, None, None], None, 0, "not tested"),
        ([math.nan, -0.2, -0.1], 0.01, 0, "not measured"),
        (None, None, 0, "not measured"),
    ],
)
def test_states(difference, p_value, equal, expected):
    assert state(interval({"x": difference}, "x"), p_value, equal) == expected
