"""What several plots share: looks of settings, error bars, legends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusion_detox.evaluation.report.reading import Interval
from fusion_detox.evaluation.report.rendering import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 34  # characters of a name in a plot


def look(setting: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a setting is called in a legend, its colour and its marker."""
    kind = setting.get("kind")
    if kind == "base":
        return "target alone", PALETTE["base"], "D"
    if kind == "wordfilter":
        return "word filter", PALETTE["filter"], "s"
    return "fusion", PALETTE["fusion"], "o"


def legend_below(axes: Axes, columns: int) -> None:
    """A legend below the label of the horizontal axis."""
    from matplotlib.transforms import ScaledTranslation

    scale = axes.figure.dpi_scale_trans
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=axes.transAxes + ScaledTranslation(-0.1, -0.5, scale),
        ncols=columns,
        handletextpad=0.5,
        columnspacing=1.4,
        borderpad=0,
    )


def errors(measured: Sequence[Interval], scale: float = 1.0) -> list[list[float]]:
    """Lengths of error bars below and above; 0 where there is no interval."""
    pairs = [
        (0.0, 0.0)
        if one.ends is None
        else (max(0.0, one.value - one.ends[0]), max(0.0, one.ends[1] - one.value))
        for one in measured
    ]
    return [[low * scale for low, _ in pairs], [high * scale for _, high in pairs]]
