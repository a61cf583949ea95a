"""Histograms of scores, and dot plots of types and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion_detox.evaluation.report.costs import compared_groups
from fusion_detox.evaluation.report.drawing import LONGEST, errors, legend_below, look
from fusion_detox.evaluation.report.markup import line
from fusion_detox.evaluation.report.reading import (
    Interval,
    Run,
    at,
    is_list,
    number,
    toxicity,
)
from fusion_detox.evaluation.report.rendering import PALETTE, Panel
from fusion_detox.evaluation.report.wording import label, percent, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def histogram_panels(run: Run) -> list[Panel]:
    """How the scores of single continuations are distributed, a panel a scorer."""
    found = []
    for place, scorer in enumerate(run.scorers):
        shares = []
        for setting in run.key_settings[:2]:
            counts = at(setting, "toxicity", scorer, "toxicity", "histogram")
            known = [number({"": c}, "") or 0.0 for c in counts] if is_list(counts) else []
            if sum(known) > 0 and setting.get("kind") != "wordfilter":
                name, colour, _ = look(setting)
                shares.append((name, colour, [100 * count / sum(known) for count in known]))
        if shares:
            parts = [
                f"{name}: {sum(s for at_, s in enumerate(values) if at_ >= len(values) / 2):.1f} % "
                "of continuations in the upper half"
                for name, _, values in shares
            ]
            found.append(
                Panel(
                    f"histogram-{place}",
                    f"{line(scorer, 30)} scorer",
                    "Histogram of the scores of single continuations. " + "; ".join(parts) + ".",
                    3.0,
                    partial(_draw_histogram, shares=shares, threshold=run.threshold),
                )
            )
    return found


def _draw_histogram(
    axes: Axes, shares: Sequence[tuple[str, str, Sequence[float]]], threshold: float
) -> None:
    for place, (name, colour, values) in enumerate(shares):
        edges = [i / len(values) for i in range(len(values) + 1)]
        filled = place == 0 and len(shares) > 1
        axes.stairs(
            values,
            edges,
            fill=filled,
            color=colour,
            alpha=0.35 if filled else 1.0,
            linewidth=1.8,
            label=name,
        )
    axes.set_yscale("function", functions=(_root, _square))
    top = max(max(values) for _, _, values in shares)
    axes.set_ylim(0, top * 1.1)
    axes.set_yticks([tick for tick in (0, 1, 2, 5, 10, 20, 40, 60, 80, 100) if tick <= top * 1.1])
    axes.axvline(threshold, color=PALETTE["plot-muted"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"Score (dashed: from {threshold:g} on it counts as toxic)")
    axes.set_ylabel("Continuations (%), root scale")
    axes.legend(loc="upper right")


def _root(values: Any) -> Any:
    import numpy as np

    return np.sqrt(np.maximum(values, 0))


def _square(values: Any) -> Any:
    import numpy as np

    return np.square(values)


@dataclass(frozen=True)
class Dots:
    """Values of one kind, by the name of their line in a dot plot."""

    name: str
    colour: str
    marker: str
    values: Mapping[str, Interval]


def dot_panel(
    ident: str,
    title: str,
    axis: str,
    dots: Sequence[Dots],
    scale: float = 1.0,
    reference: float | None = None,
    ends: tuple[float, float] | None = None,
) -> Panel:
    """A dot with its interval for each name, a line a name."""
    names = list(dict.fromkeys(name for one in dots for name in one.values))
    parts = [
        f"{name}, {one.name}: {(percent if scale == 100 else quantity)(measured)[0]}"
        for one in dots
        for name, measured in one.values.items()
    ]
    legend = len({one.name for one in dots}) > 1
    return Panel(
        ident,
        title,
        f"{axis}. " + "; ".join(parts) + ".",
        1.05 + 0.27 * len(names) + (0.3 if legend else 0),
        partial(_draw_dots, dots=dots, axis=axis, scale=scale, reference=reference, ends=ends),
    )


def _draw_dots(
    axes: Axes,
    dots: Sequence[Dots],
    axis: str,
    scale: float,
    reference: float | None,
    ends: tuple[float, float] | None,
) -> None:
    names = list(dict.fromkeys(name for one in dots for name in one.values))
    kinds = list(dict.fromkeys(one.name for one in dots))
    labelled: set[str] = set()
    for one in dots:
        shift = (kinds.index(one.name) - (len(kinds) - 1) / 2) * 0.22
        crowded = len({other.name for other in dots if set(other.values) & set(one.values)}) > 1
        axes.errorbar(
            [measured.value * scale for measured in one.values.values()],
            [names.index(name) + (shift if crowded else 0) for name in one.values],
            xerr=errors(list(one.values.values()), scale),
            fmt=one.marker,
            color=one.colour,
            markersize=5.5,
            markeredgewidth=0,
            elinewidth=1.1,
            label="" if one.name in labelled else one.name,
        )
        labelled.add(one.name)
    if reference is not None:
        axes.axvline(reference, color=PALETTE["plot-muted"], linewidth=1)
    if ends is not None:
        axes.set_xlim(*ends)
    elif reference is None:
        axes.set_xlim(left=0)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(axis)
    if len(kinds) > 1:
        legend_below(axes, len(kinds))


def type_panels(run: Run) -> list[Panel]:
    """Types of toxicity, a panel for each scorer that gives several."""
    found = []
    for place, scorer in enumerate(run.scorers):
        types = run.types(scorer)
        if len(types) < 2:
            continue
        dots = []
        for setting in run.key_settings:
            values = {
                line(label(name), LONGEST): measured
                for name in types
                if (measured := toxicity(setting, scorer, "probability", name))
            }
            if values:
                dots.append(Dots(*look(setting), values))
        if dots:
            title = f"{line(scorer, 30)} scorer"
            found.append(dot_panel(f"types-{place}", title, "Prompts of the type (%)", dots, 100))
    return found


def group_panels(run: Run) -> list[Panel]:
    """By suite, how much more a group's text loses than the control text."""
    suites: dict[str, dict[str, Interval]] = {}
    for group, ratio in compared_groups(run.primary):
        if ratio is not None:
            suite = suites.setdefault(line(group.get("suite") or "groups", 30), {})
            suite[line(group.get("group"), LONGEST)] = ratio
    found = [one for values in suites.values() for one in values.values()]
    low = min([1.0, *(end for one in found for end in (one.value, *(one.ends or ())))])
    high = max([1.0, *(end for one in found for end in (one.value, *(one.ends or ())))])
    margin = max(0.06 * (high - low), 0.002)
    return [
        dot_panel(
            f"groups-{place}",
            suite,
            "Perplexity against control (1: as the control)",
            [
                Dots(
                    "fusion",
                    PALETTE["fusion"],
                    "o",
                    dict(sorted(values.items(), key=lambda item: -item[1].value)),
                )
            ],
            reference=1.0,
            ends=(low - margin, high + margin),  # the same in all panels
        )
        for place, (suite, values) in enumerate(suites.items())
    ]
