"""Numbers as text: no more digits than the interval bears, real minus signs, plain verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from fusion_detox.evaluation.report.markup import Html, join, line, tag
from fusion_detox.evaluation.report.reading import Interval, finite, is_list

NARROW = "\u202f"  # between a number and its unit
MINUS = "\u2212"
LEVEL = 0.05


def digits(value: float, decimals: int, signed: bool = False) -> str:
    """A number with thousands separated and a real minus sign; never a negative zero.

    Halves are rounded away from 0, not to even, so that 62.5 and 27.5 stay 35 apart.
    """
    if abs(value) < 1e12:
        exact = Decimal(repr(round(value, 9)))
        rounded = exact.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)
        text = f"{rounded:{'+' if signed else ''},f}"
    else:
        text = f"{value:{'+' if signed else ''},.{decimals}f}"
    if not any(character in "123456789" for character in text):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def fitting(measured: Interval, scale: float = 1.0, least: int = 0, most: int = 5) -> int:
    """How many decimals the interval bears; without interval, three significant digits."""
    if measured.ends is not None:
        width = (measured.ends[1] - measured.ends[0]) * scale
        if width > 0:
            return min(most, max(least, math.ceil(-math.log10(width / 2))))
    size = abs(measured.value) * scale
    if size == 0:
        return least
    return min(most, max(least, 2 - math.floor(math.log10(size))))


def together(values: Iterable[Interval | None], scale: float = 1.0, most: int = 3) -> int:
    """Decimals for values that are read together: as many as the finest bears."""
    return max((fitting(one, scale, most=most) for one in values if one is not None), default=0)


def span(measured: Interval, decimals: int, scale: float = 1.0, signed: bool = False) -> str | None:
    """The interval without its value, such as ``8.9 to 13.9``."""
    if measured.ends is None:
        return None
    low, high = (digits(end * scale, decimals, signed) for end in measured.ends)
    return f"{low} to {high}"


def bracket(text: str | None) -> Html | None:
    """An interval in brackets that follows its value."""
    return None if text is None else join([" ", tag("span", f"[{text}]", class_="ci")])


def strong(shown: tuple[str, str | None]) -> Html:
    """The value alone, set off."""
    return tag("strong", shown[0])


def with_interval(shown: tuple[str, str | None]) -> Html:
    """The value, set off, and its interval in brackets."""
    return join([strong(shown), bracket(shown[1])])


def percent(measured: Interval, decimals: int | None = None) -> tuple[str, str | None]:
    """A share as percent, with its interval."""
    places = fitting(measured, 100, most=3) if decimals is None else decimals
    return f"{digits(measured.value * 100, places)}{NARROW}%", span(measured, places, 100)


def quantity(measured: Interval, decimals: int | None = None) -> tuple[str, str | None]:
    """A number as it is, with its interval."""
    places = fitting(measured) if decimals is None else decimals
    return digits(measured.value, places), span(measured, places)


def change(ratio: Interval, decimals: int | None = None) -> tuple[str, str | None]:
    """A ratio as signed change in percent, with its interval: 1.1 is ``+10 %``."""
    ends = ratio.ends
    shifted = Interval(ratio.value - 1, *((ends and (ends[0] - 1, ends[1] - 1)) or (None, None)))
    places = fitting(shifted, 100, most=1) if decimals is None else decimals
    value = digits(shifted.value * 100, places, signed=True)
    return f"{value}{NARROW}%", span(shifted, places, 100, signed=True)


def absolute(measured: Interval) -> Interval:
    """The size of a difference: sign and order of the ends turned where it is negative."""
    if measured.value >= 0:
        return measured
    ends = measured.ends
    return Interval(-measured.value, *((-ends[1], -ends[0]) if ends else (None, None)))


def cell(shown: tuple[str, str | None] | None) -> Html | None:
    """A value with its interval below it, for a table."""
    if shown is None:
        return None
    value, ends = shown
    return join([tag("span", value, class_="v"), ends and tag("span", ends, class_="i")])


def verdict(difference: Interval | None, p_value: float | None, equal: float = 0.0) -> str:
    """What a difference shows: "lower", "higher", "unclear" (may be chance) or "untested".

    Interval and p value must both exclude chance, as far as they are given.
    """
    if difference is None or (difference.ends is None and p_value is None):
        return "untested"
    inside = difference.ends is not None and difference.ends[0] <= equal <= difference.ends[1]
    if inside or (p_value is not None and p_value >= LEVEL) or difference.value == equal:
        return "unclear"
    return "lower" if difference.value < equal else "higher"


def p_text(p_value: float) -> str:
    """A p value, such as ``p = 0.03``."""
    if p_value < 0.0001:
        return "p < 0.0001"
    places = 2 if p_value >= 0.0995 else 3 if p_value >= 0.00995 else 4
    return f"p = {p_value:.{places}f}"


def size(count: float | None) -> str | None:
    """A count in short form: 7.2 M."""
    if count is None:
        return None
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.1f}{NARROW}{name}"
    return f"{count:,.0f}"


def memory(count: float | None) -> str | None:
    """A number of bytes in MB or GB."""
    if count is None:
        return None
    if count >= 1e9:
        return f"{count / 1e9:.2f}{NARROW}GB"
    return f"{count / 1e6:,.0f}{NARROW}MB"


def words(value: Any) -> str:
    """Any JSON value on one line, without its punctuation."""
    if isinstance(value, Mapping):
        return ", ".join(f"{label(name)} {words(item)}" for name, item in value.items())
    if is_list(value):
        return ", ".join(map(words, value))
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else line(value)


def label(name: object) -> str:
    """A name from the document as words."""
    return line(name).replace("_", " ")


def listed(names: list[str]) -> str:
    """Names in a sentence: a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


def as_json(value: Any) -> str:
    """JSON for people to read."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False, default=str)
