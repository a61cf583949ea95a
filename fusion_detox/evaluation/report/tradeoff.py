"""Toxicity against perplexity over all settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fusion_detox.evaluation.report.drawing import LONGEST, errors, legend_below, look
from fusion_detox.evaluation.report.markup import line
from fusion_detox.evaluation.report.plots import Dots, dot_panel
from fusion_detox.evaluation.report.reading import (
    Interval,
    Run,
    at,
    block,
    interval,
    number,
    toxicity,
)
from fusion_detox.evaluation.report.rendering import PALETTE, Panel
from fusion_detox.evaluation.report.wording import percent, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OTHERS = [PALETTE[f"other-{i}"] for i in (1, 2, 3, 4)]
_MARKERS = ("^", "v", "P", "X", "<", ">", "p", "h")


@dataclass(frozen=True)
class Point:
    """A setting in the plane of perplexity and toxicity."""

    x: Interval
    y: Interval
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points that share a look.

    Attributes:
        name: What the legend calls them.
        points: At least one.
        colour: Of the palette.
        marker: As matplotlib names it, or "ring" to mark points of another series.
        size: Of the marker, in points.
        joined: Whether a line joins them, in their order.
        named: Whether the legend lists them.
    """

    name: str
    points: Sequence[Point]
    colour: str
    marker: str
    size: float = 6.0
    joined: bool = True
    named: bool = True


def tradeoff_panels(run: Run) -> list[Panel]:
    """Toxicity against perplexity, a panel a scorer; without perplexity, toxicity alone."""
    found = []
    for place, scorer in enumerate(run.scorers):
        series = _sweeps(run, scorer)
        if series:
            found.append(tradeoff_panel(f"tradeoff-{place}", scorer, series))
            continue
        dots = [
            Dots(*look(item), {name: measured})
            for item in run.settings
            if (measured := toxicity(item, scorer, "probability"))
            and (name := line(item["name"], LONGEST))
        ]
        if dots:
            title = f"{line(scorer, 30)} scorer"
            found.append(dot_panel(f"tradeoff-{place}", title, "Toxic prompts (%)", dots, 100))
    return found


def tradeoff_panel(ident: str, scorer: str, series: Sequence[Series]) -> Panel:
    """Toxicity against perplexity for one scorer."""
    parts = [
        f"{one.name}{' ' + point.note if point.note else ''}: {percent(point.y)[0]} of prompts "
        f"toxic at perplexity {quantity(point.x)[0]}"
        for one in series
        for point in one.points
    ]
    return Panel(
        ident,
        f"{line(scorer, 30)} scorer",
        "Share of prompts with a toxic continuation against perplexity. " + "; ".join(parts) + ".",
        3.3 + 0.21 * math.ceil(sum(one.named for one in series) / _legend_columns(series)),
        partial(_draw_tradeoff, series=series),
    )


def _legend_columns(series: Sequence[Series]) -> int:
    return 2 if all(len(one.name) <= 22 for one in series) else 1


def _draw_tradeoff(axes: Axes, series: Sequence[Series]) -> None:
    for one in series:
        places = [point.x.value for point in one.points], [p.y.value * 100 for p in one.points]
        ring = one.marker == "ring"  # around a point of the series before
        axes.errorbar(
            *places,
            xerr=None if ring else errors([point.x for point in one.points]),
            yerr=None if ring else errors([point.y for point in one.points], 100),
            fmt="o" if ring else one.marker,
            color=one.colour,
            markerfacecolor="none" if ring else one.colour,
            markersize=one.size,
            markeredgewidth=1.3 if ring else 0,
            elinewidth=0.9,
            label=one.name if one.named else "_",
        )
        if len(one.points) > 1 and one.joined:
            axes.plot(*places, color=one.colour, linewidth=1.2, alpha=0.75)
        for point in one.points:
            if point.note:
                axes.annotate(
                    point.note,
                    (point.x.value, point.y.value * 100),
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize=8.5,
                    color=one.colour,
                )
    values = [point.x.value for one in series for point in one.points]
    if min(values) > 0 and max(values) > 3 * min(values):
        axes.set_xscale("log")
        _plain_log_ticks(axes, min(values), max(values))
    top = max(
        end
        for one in series
        for point in one.points
        for end in (point.y.value, *(point.y.ends or ()))
    )
    axes.set_ylim(0, max(top * 108, 2))
    axes.margins(x=0.12)
    axes.set_xlabel("Perplexity of the text (lower is more fluent)")
    axes.set_ylabel("Toxic prompts (%)")
    legend_below(axes, _legend_columns(series))


def _plain_log_ticks(axes: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    steps: tuple[float, ...] = (1, 2, 5) if high / low < 300 else (1,)
    if high / low < 10:
        steps = (1, 1.5, 2, 3, 4, 5, 7)
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    ticks = [step * 10.0**power for power in range(first, last) for step in steps]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _sweeps(run: Run, scorer: str) -> list[Series]:
    """Settings that differ in strength alone make one series."""
    groups: dict[str, list[tuple[Mapping[str, Any], Point]]] = {}
    for place, setting in enumerate(run.settings):
        x = interval(setting, "perplexity", "token_weighted")
        y = toxicity(setting, scorer, "probability")
        if x is None or y is None:
            continue
        config = dict(block(setting, "config"))
        config.pop("strength", None)
        if setting.get("kind") == "fusion" and config:
            key = json.dumps([config, setting.get("calibrator"), setting.get("map")], default=str)
        else:
            key = str(place)
        groups.setdefault(key, []).append((setting, Point(x, y)))
    few = sum(map(len, groups.values())) <= 12  # room for the strength beside every point
    series = []
    others = 0
    for members in groups.values():
        label_, colour, marker = look(members[0][0])
        size = 7.0 if members[0][0].get("kind") != "fusion" else 6.0
        if members[0][0].get("kind") == "fusion" and not any(s is run.primary for s, _ in members):
            colour = _OTHERS[others % len(_OTHERS)]
            marker = _MARKERS[others % len(_MARKERS)]
            others += 1
        members.sort(key=lambda member: number(member[0], "config", "strength") or 0.0)
        if len(members) == 1:
            fused = members[0][0].get("kind") == "fusion"
            name = line(members[0][0]["name"], LONGEST) if fused else label_
            points = [members[0][1]]
        else:
            rule = line(at(members[0][0], "config", "rule") or "fusion", 20)
            name = f"{rule}, by strength"
            points = [
                Point(
                    point.x,
                    point.y,
                    _strength(setting) if few or at_ in (0, len(members) - 1) else "",
                )
                for at_, (setting, point) in enumerate(members)
            ]
        series.append(Series(name, points, colour, marker, size))
        chosen = [point for setting, point in members if setting is run.primary]
        if chosen and len(members) > 1:
            name = f"setting “{line(at(run.primary, 'name'), 20)}”"
            series.append(Series(name, chosen, colour, "ring", 12.0))
    return series


def _strength(setting: Mapping[str, Any]) -> str:
    value = number(setting, "config", "strength")
    return "" if value is None else f"{value:g}"
