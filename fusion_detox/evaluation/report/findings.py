"""What the summary of a run says: each measure with and without fusion, and its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusion_detox.evaluation.report.numbers import (
    Shown,
    change,
    common_decimals,
    fitting,
    p_text,
    percent,
    quantity,
)
from fusion_detox.evaluation.report.reading import (
    Interval,
    Run,
    at,
    interval,
    line,
    number,
    rows,
    toxicity,
)

LEVEL = 0.05


def state(difference: Interval | None, p_value: float | None = None, equal: float = 0.0) -> str:
    """What a difference shows, as one of five fixed phrases.

    Args:
        difference: The difference or ratio, with its interval.
        p_value: If given, it must exclude chance, too.
        equal: The value that means "no difference": 0 for a difference, 1 for a ratio.

    Returns:
        "lower" or "higher" if the interval and the p-value both exclude chance, otherwise "no
        clear difference"; "not tested" if there is neither an interval nor a p-value; "not
        measured" if there is no ``difference``.
    """
    if difference is None:
        return "not measured"
    if difference.ends is None and p_value is None:
        return "not tested"
    inside = difference.ends is not None and difference.ends[0] <= equal <= difference.ends[1]
    if inside or (p_value is not None and p_value >= LEVEL) or difference.value == equal:
        return "no clear difference"
    return "lower" if difference.value < equal else "higher"


@dataclass(frozen=True)
class Finding:
    """One measure at the base, the primary variant and the word filter.

    Attributes:
        state: The result of ``state`` for fused against base.
        base: Without fusion. None if it was not measured; the same holds for the others.
        fused: With fusion.
        filtered: With the word filter.
        difference: Fused minus base, or the relative change; its note is the p-value.
    """

    state: str
    base: Shown | None
    fused: Shown | None
    filtered: Shown | None
    difference: Shown | None


def _finding(
    run: Run,
    read: Callable[[Any], Interval | None],
    show: Callable[[Interval, int], Shown],
    state: str,
    difference: Shown | None,
) -> Finding:
    values = [read(variant) for variant in (run.base, run.primary, run.word_filter)]
    places = common_decimals(values, 100 if show is percent else 1)
    base, fused, filtered = (None if one is None else show(one, places) for one in values)
    return Finding(state if fused else "not measured", base, fused, filtered, difference)


def toxicity_finding(run: Run, scorer: str) -> Finding:
    """The share of toxic prompts; the difference is in percentage points."""
    path = ("against_base", scorer, "probability")
    difference = interval(run.primary, *path, "difference")
    p_value = number(run.primary, *path, "p_value")
    shown = None
    if difference is not None:
        shown = quantity(difference, fitting(difference, 100, most=2), 100, signed=True)
        shown = shown._replace(note=None if p_value is None else p_text(p_value))
    return _finding(
        run, lambda one: toxicity(one, scorer), percent, state(difference, p_value), shown
    )


def perplexity_finding(run: Run) -> Finding:
    """The perplexity of the continuations; the difference is the relative change."""
    relative = interval(run.primary, "perplexity", "relative")
    return _finding(
        run,
        lambda one: interval(one, "perplexity", "token_weighted"),
        quantity,
        state(relative, equal=1.0),
        None if relative is None else change(relative),
    )


def plain_finding(run: Run, show: Callable[[Interval, int], Shown], *path: str) -> Finding:
    """A measure whose difference from the base is not tested, such as diversity."""
    base, fused = number(run.base, *path), number(run.primary, *path)
    difference = None if base is None or fused is None else Interval(fused - base)
    return _finding(run, lambda one: interval(one, *path), show, state(difference), None)


@dataclass(frozen=True)
class Group:
    """How the text of one group fares against the control text of its suite.

    Attributes:
        name: The group.
        suite: The suite of texts that it belongs to.
        ratio: The group's perplexity ratio over the control's; None if it is infinite.
        state: The result of ``state`` for ``ratio`` against 1.
        impossible: The number of its tokens that fusion made impossible.
    """

    name: str
    suite: str
    ratio: Interval | None
    state: str
    impossible: int


def compared_groups(variant: Any) -> list[Group]:
    """All groups that have a control, the most affected first; without the controls."""
    found = []
    for row in rows(variant, "groups"):
        ratio, impossible = interval(row, "ratio"), int(number(row, "impossible") or 0)
        if impossible or (ratio is not None and not is_control(ratio)):
            name, suite = line(row.get("group"), 60), line(row.get("suite") or "groups", 30)
            found.append(Group(name, suite, ratio, state(ratio, equal=1.0), impossible))
    return sorted(found, key=lambda group: -(group.ratio.value if group.ratio else 0))


def is_control(ratio: Interval) -> bool:
    """Whether a ratio is that of the control text to itself."""
    return ratio.value == 1 and ratio.ends is None


def scorer_auc(run: Run, scorer: str) -> tuple[str, float] | None:
    """The first AUC that a scorer's record states, and the data it was measured on."""
    auc = at(run.results, "scorers", scorer, "auc")
    found = auc.items() if isinstance(auc, dict) else [("its test data", auc)]
    values = [(name, number({"auc": value}, "auc")) for name, value in found]
    return next(((name, value) for name, value in values if value is not None), None)
