"""The plots: toxicity against perplexity, score histograms, types of toxicity and groups."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fusion_detox.errors import MissingExtraError
from fusion_detox.evaluation.report.findings import compared_groups
from fusion_detox.evaluation.report.numbers import label, percent, quantity
from fusion_detox.evaluation.report.peers import is_mixed, peer_results
from fusion_detox.evaluation.report.reading import (
    Interval,
    Run,
    at,
    block,
    interval,
    is_list,
    line,
    number,
    run_labels,
    toxicity,
)
from fusion_detox.evaluation.report.tables import all_scorers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinguishable with any colour vision, and by their markers. In the dark scheme, report.css
# inverts the lightness of the plots.
PALETTE = {
    "ink": "#22262b",
    "muted": "#5b636d",
    "grid": "#dfe3e7",
    "base": "#59616b",
    "fusion": "#0b62b0",
    "filter": "#b4500b",
    "other-1": "#147a58",
    "other-2": "#8b4aa8",
    "other-3": "#866803",
    "other-4": "#a83a5b",
}
_OTHERS = [PALETTE[f"other-{i}"] for i in (1, 2, 3, 4)]
_RUNS = [PALETTE["fusion"], PALETTE["filter"], *_OTHERS]
_PEER_MARKERS = ("^", "v", "<", ">", "P", "X", "p", "h", "*", "d", "8")
_MARKERS = ("^", "v", "P", "X", "<", ">", "p", "h")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fusion_detox",  # the same plot has the same bytes
    "text.parse_math": False,  # a "$" in a name is a "$"
    "axes.edgecolor": PALETTE["muted"],
    "axes.facecolor": "none",
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.labelcolor": PALETTE["ink"],
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "font.size": 9.5,
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": PALETTE["ink"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelcolor": PALETTE["ink"],
    "ytick.labelcolor": PALETTE["ink"],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
_WIDTH = 5.0  # inches; small enough that text is legible at a phone's width
_LONGEST = 34  # characters of a name in a plot


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: What it shows; drawn above it.
        description: Its values as text, for readers who cannot see it.
        height: In inches.
        draw: Draws it into axes.
    """

    title: str
    description: str
    height: float
    draw: Callable[[Axes], None]


def require_matplotlib() -> None:
    """Raise ``MissingExtraError`` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "evaluate")


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # the user's matplotlibrc must not change the plots
        matplotlib.rcParams.update(cast(Any, _STYLE))  # its keys are typed as literals
        # The reader's fonts have the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def svg_uri(panel: Panel) -> str:
    """A panel as an SVG image in a ``data:`` URI, which needs no file and no network."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(_WIDTH, panel.height), layout="constrained")
        axes = figure.add_subplot()
        panel.draw(axes)
        axes.set_title(panel.title)
        stream = io.BytesIO()
        metadata = {"Title": panel.title, "Date": None, "Creator": None}
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"


def png(kinds: Sequence[Sequence[Panel]], heading: str) -> bytes:
    """All panels in one image; each kind starts a new row of up to three panels."""
    from matplotlib.figure import Figure

    lines = [kind[at : at + 3] for kind in kinds for at in range(0, len(kind), 3)]
    columns = max(map(len, lines), default=1)
    heights = [max(panel.height for panel in panels) for panels in lines]
    with _style():
        size = (_WIDTH * columns, sum(heights) + 0.5)
        figure = Figure(figsize=size, layout="constrained", dpi=130)
        figure.suptitle(heading, x=0.01, ha="left", fontsize=13, weight="bold")
        if lines:
            grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
        for row, panels in enumerate(lines):
            for column, panel in enumerate(panels):
                # A short panel beside a tall one must not be stretched.
                spare = max(heights[row] - panel.height, 1e-3)
                parts = grid[row, column].subgridspec(2, 1, height_ratios=[panel.height, spare])
                axes = figure.add_subplot(parts[0])
                panel.draw(axes)
                axes.set_title(panel.title)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _look(variant: Mapping[str, Any]) -> tuple[str, str, str]:
    """A variant's name in a legend, its colour and its marker."""
    if variant.get("kind") == "base":
        return "target alone", PALETTE["base"], "D"
    if variant.get("kind") == "wordfilter":
        return "word filter", PALETTE["filter"], "s"
    return "fusion", PALETTE["fusion"], "o"


def _errors(measured: Sequence[Interval], scale: float = 1.0) -> list[list[float]]:
    """Lengths of the error bars below and above; 0 if there is no interval."""
    ends = [one.ends or (one.value, one.value) for one in measured]
    low = [max(0.0, one.value - end[0]) * scale for one, end in zip(measured, ends, strict=True)]
    high = [max(0.0, end[1] - one.value) * scale for one, end in zip(measured, ends, strict=True)]
    return [low, high]


def _legend_below(axes: Axes, columns: int) -> None:
    from matplotlib.transforms import ScaledTranslation

    below = ScaledTranslation(-0.1, -0.5, axes.figure.dpi_scale_trans)  # inches
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=axes.transAxes + below,
        ncols=columns,
        handletextpad=0.5,
        columnspacing=1.4,
        borderpad=0,
    )


# Toxicity against perplexity


@dataclass(frozen=True)
class Point:
    """A variant at its perplexity ``x`` and toxicity ``y``."""

    x: Interval
    y: Interval
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points that share a style.

    Attributes:
        name: Its name in the legend.
        points: At least one.
        colour: From the palette.
        marker: As matplotlib names it, or "ring" to mark a point of another series.
        size: Size of the marker, in points.
        joined: Whether a line joins the points, in their order.
        in_legend: Whether the legend lists it.
        hollow: Whether its markers are outlines.
    """

    name: str
    points: Sequence[Point]
    colour: str
    marker: str
    size: float = 6.0
    joined: bool = True
    in_legend: bool = True
    hollow: bool = False


def _point(variant: Mapping[str, Any], scorer: str, note: str = "") -> Point | None:
    x, y = interval(variant, "perplexity", "token_weighted"), toxicity(variant, scorer)
    return None if x is None or y is None else Point(x, y, note)


def _relative_point(variant: Mapping[str, Any], scorer: str, note: str = "") -> Point | None:
    """A variant's perplexity and toxicity, as ratios to the target alone."""
    if variant.get("kind") == "base":
        return None if _point(variant, scorer) is None else Point(Interval(1.0), Interval(1.0))
    x = interval(variant, "perplexity", "relative")
    y = interval(variant, "against_base", scorer, "probability", "ratio")
    return None if x is None or y is None else Point(x, y, note)


def tradeoff_panels(run: Run) -> list[Panel]:
    """Toxicity against perplexity, one panel per scorer; without perplexity, toxicity alone."""
    found = []
    for scorer in run.scorers:
        series = _sweeps(run, scorer)
        if series:
            found.append(_tradeoff_panel(scorer, series))
            continue
        dots = [
            Dots(*_look(variant), {line(variant["name"], _LONGEST): measured})
            for variant in run.variants
            if (measured := toxicity(variant, scorer))
        ]
        if dots:
            found.append(_dot_panel(f"{line(scorer, 30)} scorer", "Toxic prompts (%)", dots, 100))
    return found


def comparison_panels(runs: Sequence[Run]) -> list[Panel]:
    """Toxicity against perplexity for the variants of all runs, one panel per scorer."""
    found = []
    for scorer in all_scorers(runs):
        series = []
        for place, (run, name) in enumerate(zip(runs, run_labels(runs), strict=True)):
            markers = {"base": "D", "wordfilter": "s"}
            fused = ("o", *_MARKERS)[place % (len(_MARKERS) + 1)]
            points: dict[str, list[Point]] = {}
            for variant in sorted(run.variants, key=lambda one: one.get("kind") in markers):
                point = _point(variant, scorer)
                if point is not None:
                    points.setdefault(markers.get(str(variant.get("kind")), fused), []).append(
                        point
                    )
            for marker, drawn in points.items():
                first = marker == next(iter(points))
                colour = _RUNS[place % len(_RUNS)]
                series.append(
                    Series(line(name, _LONGEST), drawn, colour, marker, 6.0, False, first)
                )
        if series:
            found.append(_tradeoff_panel(scorer, series))
    return found


def peer_panels(run: Run) -> list[Panel]:
    """The run's variants and the peers as ratios to the target alone, by common scorer."""
    found = []
    for scorer in run.scorers:
        peers = _peers(run, scorer)
        if peers:
            own = _sweeps(run, scorer, _relative_point)
            found.append(_tradeoff_panel(scorer, [*own, *peers], relative=True))
    return found


def _peers(run: Run, scorer: str) -> list[Series]:
    """The methods that were measured elsewhere, each with a marker of its own."""
    methods: dict[str, list[Point]] = {}
    results = peer_results(run)
    for one in sorted(results, key=lambda one: number(one, "strength") or 0.0):
        x = interval(one, "perplexity", "relative")
        y = interval(one, "toxicity", scorer, "ratio", "ratio")
        if x is None or y is None:
            continue
        temperature = f", T {one['temperature']:g}" if is_mixed(results) else ""
        point = Point(x, y, f"{one['strength']:g}")
        methods.setdefault(f"{line(one['method'], 24)}{temperature}", []).append(point)
    few = sum(map(len, methods.values())) <= 12
    return [
        Series(
            f"{name} (elsewhere)",
            points if few and len(points) > 1 else [Point(one.x, one.y) for one in points],
            _OTHERS[place % len(_OTHERS)],
            _PEER_MARKERS[place % len(_PEER_MARKERS)],
            7.0,
            hollow=True,
        )
        for place, (name, points) in enumerate(sorted(methods.items()))
    ]


def _sweeps(
    run: Run,
    scorer: str,
    place_of: Callable[[Mapping[str, Any], str, str], Point | None] = _point,
) -> list[Series]:
    """Variants that differ in strength alone make one series."""
    groups: dict[str, list[tuple[Mapping[str, Any], Point]]] = {}
    for place, variant in enumerate(run.variants):
        strength = number(variant, "config", "strength")
        point = place_of(variant, scorer, "" if strength is None else f"{strength:g}")
        if point is None:
            continue
        config = {k: v for k, v in block(variant, "config").items() if k != "strength"}
        same = [config, variant.get("calibrator"), variant.get("map")]
        swept = variant.get("kind") == "fusion" and config
        key = json.dumps(same, default=str) if swept else str(place)
        groups.setdefault(key, []).append((variant, point))
    few = sum(map(len, groups.values())) <= 12  # room for the strength beside every point
    series: list[Series] = []
    others = 0
    for members in groups.values():
        members.sort(key=lambda member: number(member[0], "config", "strength") or 0.0)
        first = members[0][0]
        name, colour, marker = _look(first)
        if name == "fusion" and not any(variant is run.primary for variant, _ in members):
            colour, marker = _OTHERS[others % len(_OTHERS)], _MARKERS[others % len(_MARKERS)]
            others += 1
        if len(members) == 1:
            name = line(first["name"], _LONGEST) if name == "fusion" else name
            points = [Point(members[0][1].x, members[0][1].y)]
        else:
            name = f"{line(at(first, 'config', 'rule') or 'fusion', 20)}, by strength"
            points = [
                point if few or i in (0, len(members) - 1) else Point(point.x, point.y)
                for i, (_, point) in enumerate(members)
            ]
        series.append(Series(name, points, colour, marker, 7.0 if marker in "Ds" else 6.0))
        chosen = [Point(p.x, p.y) for variant, p in members if variant is run.primary]
        if chosen and len(members) > 1:
            name = f"setting “{line(at(run.primary, 'name'), 20)}”"
            series.append(Series(name, chosen, colour, "ring", 12.0))
    return series


def _tradeoff_panel(scorer: str, series: Sequence[Series], *, relative: bool = False) -> Panel:
    """``relative``: the points are ratios to the target alone."""

    def said(point: Point) -> str:
        x = quantity(point.x).value
        if relative:
            return f"{quantity(point.y).value} times the toxic prompts at {x} times the perplexity"
        return f"{percent(point.y).value} of prompts toxic at perplexity {x}"

    parts = [
        f"{one.name}{' ' + point.note if point.note else ''}: {said(point)}"
        for one in series
        for point in one.points
    ]
    than = ", as ratios to the target alone" if relative else ""
    columns = 2 if all(len(one.name) <= 22 for one in series) else 1
    return Panel(
        f"{line(scorer, 30)} scorer",
        f"Toxic prompts against perplexity{than}. {'; '.join(parts)}.",
        3.3 + 0.21 * math.ceil(sum(one.in_legend for one in series) / columns),
        partial(_draw_tradeoff, series=series, columns=columns, relative=relative),
    )


def _draw_tradeoff(
    axes: Axes, series: Sequence[Series], columns: int, relative: bool = False
) -> None:
    scale = 1 if relative else 100
    for one in series:
        x, y = [point.x for point in one.points], [point.y for point in one.points]
        places = [measured.value for measured in x], [measured.value * scale for measured in y]
        ring = one.marker == "ring"
        axes.errorbar(
            *places,
            xerr=None if ring else _errors(x),
            yerr=None if ring else _errors(y, scale),
            fmt="o" if ring else one.marker,
            color=one.colour,
            markerfacecolor="none" if ring or one.hollow else one.colour,
            markersize=one.size,
            markeredgewidth=1.3 if ring or one.hollow else 0,
            elinewidth=0.9,
            label=one.name if one.in_legend else "_",
        )
        if len(one.points) > 1 and one.joined:
            axes.plot(*places, color=one.colour, linewidth=1.2, alpha=0.75)
        for point in one.points:
            axes.annotate(
                point.note,
                (point.x.value, point.y.value * scale),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8.5,
                color=one.colour,
            )
    points = [point for one in series for point in one.points]
    low, high = min(point.x.value for point in points), max(point.x.value for point in points)
    if low > 0 and high > 3 * low:
        _log_axis(axes, high / low)
    top = max(end for point in points for end in (point.y.value, *(point.y.ends or ())))
    axes.set_ylim(0, top * 1.08 if relative else max(top * 108, 2))
    axes.margins(x=0.12)
    if relative:
        axes.axhline(1, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        axes.axvline(1, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel("Perplexity, times the target's (lower is more fluent)")
        axes.set_ylabel("Toxic prompts, times the target's")
    else:
        axes.set_xlabel("Perplexity of the text (lower is more fluent)")
        axes.set_ylabel("Toxic prompts (%)")
    _legend_below(axes, columns)


def _log_axis(axes: Axes, span: float) -> None:
    """A logarithmic horizontal axis with plain numbers, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    ticks = (1, 1.5, 2, 3, 4, 5, 7) if span < 10 else (1, 2, 5) if span < 300 else (1,)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))


# Histograms of scores


def histogram_panels(run: Run) -> list[Panel]:
    """The distribution of the scores of single continuations, one panel per scorer."""
    found = []
    for scorer in run.scorers:
        shares = []
        for variant in run.key_variants:
            counts = at(variant, "toxicity", scorer, "toxicity", "histogram")
            known = [number({"n": c}, "n") or 0.0 for c in counts] if is_list(counts) else []
            if sum(known) > 0 and variant is not run.word_filter:
                name, colour, _ = _look(variant)
                shares.append((name, colour, [100 * count / sum(known) for count in known]))
        if shares:
            parts = [
                f"{name}: {sum(values[math.ceil(len(values) / 2) :]):.1f} % of continuations in "
                "the upper half"
                for name, _, values in shares
            ]
            found.append(
                Panel(
                    f"{line(scorer, 30)} scorer",
                    f"Histogram of the scores of single continuations. {'; '.join(parts)}.",
                    3.0,
                    partial(_draw_histogram, shares=shares, threshold=run.threshold),
                )
            )
    return found


def _draw_histogram(
    axes: Axes, shares: Sequence[tuple[str, str, Sequence[float]]], threshold: float
) -> None:
    import numpy as np

    for place, (name, colour, values) in enumerate(shares):
        filled = place == 0 and len(shares) > 1
        axes.stairs(
            values,
            [i / len(values) for i in range(len(values) + 1)],
            fill=filled,
            color=colour,
            alpha=0.35 if filled else 1.0,
            linewidth=1.8,
            label=name,
        )
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    top = 1.1 * max(max(values) for _, _, values in shares)
    axes.set_ylim(0, top)
    axes.set_yticks([tick for tick in (0, 1, 2, 5, 10, 20, 40, 60, 80, 100) if tick <= top])
    axes.axvline(threshold, color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"Score (dashed: counts as toxic from {threshold:g})")
    axes.set_ylabel("Continuations (%), square-root scale")
    axes.legend(loc="upper right")


# Dot plots of types and groups


@dataclass(frozen=True)
class Dots:
    """The values of one series, by the name of their row in a dot plot."""

    name: str
    colour: str
    marker: str
    values: Mapping[str, Interval]


def type_panels(run: Run) -> list[Panel]:
    """Types of toxicity, one panel for each scorer that reports several."""
    found = []
    for scorer in run.scorers:
        types = run.types(scorer)
        dots = [
            Dots(*_look(variant), values)
            for variant in run.key_variants
            if (
                values := {
                    line(label(name), _LONGEST): measured
                    for name in types
                    if (measured := toxicity(variant, scorer, type_=name))
                }
            )
        ]
        if dots and len(types) > 1:
            title = f"{line(scorer, 30)} scorer"
            found.append(_dot_panel(title, "Prompts with this type (%)", dots, 100))
    return found


def group_panels(run: Run) -> list[Panel]:
    """How much more fusion affects a group's text than the control text, one panel per suite."""
    suites: dict[str, dict[str, Interval]] = {}
    for group in compared_groups(run.primary):
        if group.ratio is not None:
            suites.setdefault(group.suite, {})[line(group.name, _LONGEST)] = group.ratio
    found = [one for values in suites.values() for one in values.values()]
    places = [1.0, *(end for one in found for end in (one.value, *(one.ends or ())))]
    margin = max(0.06 * (max(places) - min(places)), 0.002)
    limits = min(places) - margin, max(places) + margin  # the same in all panels
    axis = "Perplexity ratio to the control (1: equal)"
    return [
        _dot_panel(suite, axis, [Dots("fusion", PALETTE["fusion"], "o", values)], 1.0, 1.0, limits)
        for suite, values in suites.items()
    ]


def _dot_panel(
    title: str,
    axis: str,
    dots: Sequence[Dots],
    scale: float = 1.0,
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
) -> Panel:
    """A row for each name, with a dot and its interval for each kind."""
    names = list(dict.fromkeys(name for one in dots for name in one.values))
    parts = [
        f"{name}, {one.name}: {(percent if scale == 100 else quantity)(measured).value}"
        for one in dots
        for name, measured in one.values.items()
    ]
    return Panel(
        title,
        f"{axis}. {'; '.join(parts)}.",
        1.05 + 0.27 * len(names) + (0.3 if len({one.name for one in dots}) > 1 else 0),
        partial(_draw_dots, dots=dots, axis=axis, scale=scale, reference=reference, limits=limits),
    )


def _draw_dots(
    axes: Axes,
    dots: Sequence[Dots],
    axis: str,
    scale: float,
    reference: float | None,
    limits: tuple[float, float] | None,
) -> None:
    names = list(dict.fromkeys(name for one in dots for name in one.values))
    kinds = list(dict.fromkeys(one.name for one in dots))
    for place, one in enumerate(dots):
        others = (set(other.values) for other in dots if other.name != one.name)
        shares_rows = any(rows & set(one.values) for rows in others)
        shift = (kinds.index(one.name) - (len(kinds) - 1) / 2) * 0.22 if shares_rows else 0
        axes.errorbar(
            [measured.value * scale for measured in one.values.values()],
            [names.index(name) + shift for name in one.values],
            xerr=_errors(list(one.values.values()), scale),
            fmt=one.marker,
            color=one.colour,
            markersize=5.5,
            markeredgewidth=0,
            elinewidth=1.1,
            label="_" if one.name in [other.name for other in dots[:place]] else one.name,
        )
    if reference is not None:
        axes.axvline(reference, color=PALETTE["muted"], linewidth=1)
    if limits is None:
        axes.set_xlim(left=0)
    else:
        axes.set_xlim(*limits)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(axis)
    if len(kinds) > 1:
        _legend_below(axes, len(kinds))
