"""How numbers are written, and that text never becomes markup."""

import pytest

from fusion_detox.evaluation.report.markup import Html, escape, tag
from fusion_detox.evaluation.report.reading import Interval
from fusion_detox.evaluation.report.wording import change, p_text, percent, quantity, verdict


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
def test_numbers_show_what_their_interval_bears(shown, expected):
    assert (shown[0].replace("\u202f", " "), shown[1]) == expected


def test_p_values_and_verdicts():
    shown = [p_text(p) for p in (0.00001, 0.0001, 0.0314, 0.41, 1.0)]
    assert shown == ["p < 0.0001", "p = 0.0001", "p = 0.031", "p = 0.41", "p = 1.00"]
    assert verdict(Interval(1.1, 1.05, 1.2), None, equal=1.0) == "higher"
    assert verdict(Interval(1.1, 1.0, 1.2), None, equal=1.0) == "unclear"


def test_markup_escapes_what_is_not_markup():
    assert tag("p", "<b>", Html("<i></i>"), class_='"x"', hidden=False, inert=True) == (
        '<p class="&quot;x&quot;" inert>&lt;b&gt;<i></i></p>'
    )
    assert escape(escape("<")) == "&lt;"
