"""Plots drawn with matplotlib, as SVG for a page with two colour schemes and as one PNG."""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from fusion_detox.errors import MissingExtraError
from fusion_detox.evaluation.report.markup import Html, tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The light scheme. In the page each colour is replaced by the CSS variable of the same name,
# which report.css sets for both schemes. Told apart with any colour vision, and by their markers.
PALETTE = {
    "plot-ink": "#22262b",
    "plot-muted": "#5b636d",
    "plot-grid": "#dfe3e7",
    "plot-ground": "#fefefe",
    "base": "#59616b",
    "fusion": "#0b62b0",
    "filter": "#b4500b",
    "other-1": "#147a58",
    "other-2": "#8b4aa8",
    "other-3": "#866803",
    "other-4": "#a83a5b",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "fusion_detox",  # the same plot has the same bytes
    "text.parse_math": False,  # a "$" in a name is a "$"
    "axes.edgecolor": PALETTE["plot-muted"],
    "axes.labelcolor": PALETTE["plot-ink"],
    "axes.titlecolor": PALETTE["plot-ink"],
    "axes.facecolor": PALETTE["plot-ground"],
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": PALETTE["plot-ground"],
    "font.size": 9.5,
    "grid.color": PALETTE["plot-grid"],
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": PALETTE["plot-ink"],
    "text.color": PALETTE["plot-ink"],
    "xtick.color": PALETTE["plot-muted"],
    "ytick.color": PALETTE["plot-muted"],
    "xtick.labelcolor": PALETTE["plot-ink"],
    "ytick.labelcolor": PALETTE["plot-ink"],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
WIDTH = 5.0  # inches of one plot, so that its text is legible at a phone's width


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        ident: Its id in the page, made of letters, digits and hyphens.
        title: What it shows; drawn above it.
        description: For readers who do not see it.
        height: In inches.
        draw: Draws it into axes.
    """

    ident: str
    title: str
    description: str
    height: float
    draw: Callable[[Axes], None]


def require_matplotlib() -> None:
    """Raises ``MissingExtraError`` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "evaluate")


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(cast(Any, _STYLE))  # its keys are typed as literals
        # The page's fonts have the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def svg(panel: Panel) -> Html:
    """A panel as an ``<svg>`` element for a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(WIDTH, panel.height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        panel.draw(axes)
        axes.set_title(panel.title)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return _for_page(stream.getvalue(), panel)


def png(lines: Sequence[Sequence[Panel]], heading: str) -> bytes:
    """Panels in one picture: each kind on lines of its own, up to three on a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = [line[at : at + 3] for line in lines for at in range(0, len(line), 3)]
    columns = max(map(len, lines), default=1)
    heights = [max(panel.height for panel in line) for line in lines]
    with _style():
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
        size = (WIDTH * columns, sum(heights) + 0.5)
        figure = Figure(figsize=size, layout=layout, dpi=130)
        FigureCanvasAgg(figure)
        figure.suptitle(heading, x=0.01, ha="left", fontsize=13, weight="bold")
        if lines:
            grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
        for row, line in enumerate(lines):
            for column, panel in enumerate(line):
                # A low panel beside a high one is not stretched.
                spare = max(heights[row] - panel.height, 1e-3)
                parts = grid[row, column].subgridspec(2, 1, height_ratios=[panel.height, spare])
                axes = figure.add_subplot(parts[0])
                panel.draw(axes)
                axes.set_title(panel.title)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _for_page(text: str, panel: Panel) -> Html:
    """Cuts matplotlib's document down to an element that shares a page with others."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, count=1, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None, "matplotlib writes a viewBox"
    body = text[text.index(">") + 1 : text.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = re.sub(r"<[^<>]+>", lambda match: _adapt(match[0], panel.ident), body)
    body = re.sub(r"\n\s*", "\n", body)
    names = f"{panel.ident}-title", f"{panel.ident}-text"
    return Html(
        f'<svg role="img" viewBox="{box[1]}" aria-labelledby="{names[0]} {names[1]}">'
        + tag("title", panel.title, id=names[0])
        + tag("desc", panel.description, id=names[1])
        + body
        + "</svg>"
    )


def _adapt(element: str, ident: str) -> str:
    """One tag: ids of its own, the page's fonts, colours by their variables."""
    element = element.replace("xlink:href", "href")
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{ident}-", element)
    element = re.sub(r"font: (?:\w+ )*?([\d.]+px)[^;\"]*", r"font-size: \1", element)
    element = re.sub(r"font-family: [^;\"]*;?", "", element)
    for name, colour in PALETTE.items():
        element = element.replace(colour, f"var(--{name})")
    return element


def figure(panel: Panel) -> Html:
    """A panel as a ``<figure>``."""
    return tag("figure", svg(panel), class_="plot")


def figures(panels: Sequence[Panel], caption: object) -> Html | None:
    """Panels beside each other, with one caption; None without panels."""
    if not panels:
        return None
    return tag(
        "div",
        tag("div", *map(figure, panels), class_="panels"),
        tag("p", caption, class_="caption"),
        class_="plots",
    )
