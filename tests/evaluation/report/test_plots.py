"""The plots show the values, in colours that are legible in both colour schemes."""

import re
from pathlib import Path

from fusion_detox.evaluation import report
from fusion_detox.evaluation.report.plots import (
    PALETTE,
    group_panels,
    tradeoff_panels,
    type_panels,
)
from fusion_detox.evaluation.report.reading import Run

from .documents import measure, results
from .page import plots, read


def test_plots_draw_the_values_and_their_intervals():
    from matplotlib.figure import Figure

    document = results()
    panel = tradeoff_panels(Run(document))[0]
    axes = Figure().add_subplot()
    panel.draw(axes)
    drawn = set()
    for container in axes.containers:
        if len(container[2]) < 2:  # the ring around the default has no bars
            continue
        data, _, (across, upright) = container
        for x, y, wide, tall in zip(
            *data.get_data(), across.get_segments(), upright.get_segments(), strict=True
        ):
            numbers = (x, *wide[:, 0], y, *tall[:, 1])
            drawn.add(tuple(round(float(n), 3) for n in numbers))
    expected = set()
    for item in document["settings"]:
        x = item["perplexity"]["token_weighted"]
        y = [100 * v for v in item["toxicity"]["lexical"]["toxicity"]["probability"]]
        expected.add(tuple(round(float(n), 3) for n in (*x, *y)))
    assert drawn == expected


def test_groups_are_drawn_on_one_scale():
    from matplotlib.figure import Figure

    limits = set()
    for panel in group_panels(Run(results())):
        axes = Figure().add_subplot()
        panel.draw(axes)
        limits.add(axes.get_xlim())
    assert len(limits) == 1


def test_plots_use_the_palette_and_keep_their_text(written):
    drawn = "".join(plots(read(written / "report.html")))
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})\b", drawn)) <= set(PALETTE.values())
    assert {PALETTE[name] for name in ("base", "fusion", "filter", "ink", "grid")} <= set(
        re.findall(r"#[0-9a-f]{6}\b", drawn)
    )
    assert "<text" in drawn
    assert "Perplexity of the text" in drawn


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def in_the_dark(colour):
    """What the filter ``invert(1) hue-rotate(180deg)`` in report.css makes of a colour."""
    inverted = [1 - int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    rows = ((-0.574, 1.43, 0.144), (0.426, 0.43, 0.144), (0.426, 1.43, -0.856))
    mixed = [sum(w * part for w, part in zip(row, inverted, strict=True)) for row in rows]
    return "#" + "".join(f"{round(255 * min(1, max(0, part))):02x}" for part in mixed)


def test_colours_are_legible_in_both_schemes():
    style = (Path(report.__file__).parent / "templates" / "report.css").read_text("utf-8")
    assert ".plot img { filter: invert(1) hue-rotate(180deg); }" in style
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+);", b)) for b in style.split("@media")[:2])
    assert light.keys() == dark.keys()
    for scheme, plotted in ((light, PALETTE.get), (dark, lambda name: in_the_dark(PALETTE[name]))):
        for name in ("ink", "muted", "link", "good", "bad", "unclear", "fusion"):
            for ground in ("ground", "soft"):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)
        for name in PALETTE:
            if name != "grid":
                assert contrast(plotted(name), scheme["ground"]) >= 3, name


def test_without_perplexity_toxicity_is_drawn_alone():
    document = results()
    for item in document["settings"]:
        item["perplexity"] = None
    panels = tradeoff_panels(Run(document))
    assert len(panels) == 2
    assert "default, fusion: 11.2\u202f%" in panels[0].description


def test_types_are_drawn_if_a_scorer_has_several():
    document = results()
    assert type_panels(Run(document)) == []
    for item in document["settings"]:
        item["toxicity"]["lexical"]["identity_attack"] = measure(0.05)
    (panel,) = type_panels(Run(document))
    assert "identity attack, target alone: 5.0\u202f%" in panel.description
