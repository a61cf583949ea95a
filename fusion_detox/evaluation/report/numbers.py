"""Numbers as text, with only as many digits as their interval supports."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, NamedTuple

from fusion_detox.evaluation.report.reading import Interval, is_list, jsonable, line

NARROW = "\u202f"  # the space between a number and its unit
MINUS = "\u2212"


class Shown(NamedTuple):
    """A number as text, such as ``11 %``, with its interval, such as ``9 to 14``, and a note."""

    value: str
    ends: str | None = None
    note: str | None = None


def digits(value: float, decimals: int, signed: bool = False) -> str:
    """The number with thousands separators and a real minus sign; never a negative zero.

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


def fitting(measured: Interval, scale: float = 1.0, most: int = 5) -> int:
    """How many decimals the interval supports; three significant digits if there is none."""
    if measured.ends is not None:
        width = (measured.ends[1] - measured.ends[0]) * scale
        if width > 0:
            return min(most, max(0, math.ceil(-math.log10(width / 2))))
    size = abs(measured.value) * scale
    return min(most, max(0, 2 - math.floor(math.log10(size)))) if size else 0


def common_decimals(values: Iterable[Interval | None], scale: float = 1.0) -> int:
    """The number of decimals for values shown together: as many as the most precise supports."""
    return max((fitting(one, scale, most=3) for one in values if one is not None), default=0)


def quantity(
    measured: Interval, decimals: int | None = None, scale: float = 1.0, signed: bool = False
) -> Shown:
    """A number, multiplied by ``scale``, with its interval."""
    places = fitting(measured, scale) if decimals is None else decimals
    ends = measured.ends and " to ".join(digits(x * scale, places, signed) for x in measured.ends)
    return Shown(digits(measured.value * scale, places, signed), ends)


def percent(measured: Interval, decimals: int | None = None) -> Shown:
    """A share as percent, with its interval."""
    places = fitting(measured, 100, most=3) if decimals is None else decimals
    value, ends, _ = quantity(measured, places, 100)
    return Shown(f"{value}{NARROW}%", ends)


def change(ratio: Interval, decimals: int | None = None) -> Shown:
    """A ratio as a signed change in percent, with its interval: 1.1 is ``+10 %``."""
    ends = (None, None) if ratio.ends is None else (ratio.ends[0] - 1, ratio.ends[1] - 1)
    shifted = Interval(ratio.value - 1, *ends)
    places = fitting(shifted, 100, most=1) if decimals is None else decimals
    value, shown_ends, _ = quantity(shifted, places, 100, signed=True)
    return Shown(f"{value}{NARROW}%", shown_ends)


def p_text(p_value: float) -> str:
    """A p-value, such as ``p = 0.03``."""
    if p_value < 0.0001:
        return "p < 0.0001"
    places = 2 if p_value >= 0.0995 else 3 if p_value >= 0.00995 else 4
    return f"p = {p_value:.{places}f}"


def size(count: float) -> str:
    """A count in short form: ``7.2 M``."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.1f}{NARROW}{name}"
    return f"{count:,.0f}"


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
    """A key of the document as words."""
    return line(name).replace("_", " ")


def as_json(value: Any) -> str:
    """JSON, indented for readers."""
    return json.dumps(jsonable(value), indent=2, ensure_ascii=False, default=str)
