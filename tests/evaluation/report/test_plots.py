"""Plots draw the values, in colours that can be told apart."""

import re
from pathlib import Path

from fusion_detox.evaluation.report import rendering
from fusion_detox.evaluation.report.plots import group_panels, type_panels
from fusion_detox.evaluation.report.reading import Run
from fusion_detox.evaluation.report.rendering import PALETTE
from fusion_detox.evaluation.report.tradeoff import tradeoff_panels

from .documents import measure, results


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


def test_plots_take_the_page_s_colours(written):
    source = (written / "report.html").read_text(encoding="utf-8")
    plots = "".join(re.findall("<svg.*?</svg>", source, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", plots)  # all are variables, for both schemes
    assert "font-family" not in plots
    assert "<text" in plots
    used = set(re.findall(r"var\(--([\w-]+)\)", plots))
    assert {"base", "fusion", "filter", "plot-ink", "plot-grid"} <= used <= set(PALETTE)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_are_legible_in_both_schemes():
    style = (Path(rendering.__file__).parent / "report.css").read_text(encoding="utf-8")
    blocks = [dict(re.findall(r"--([\w-]+): (#\w+);", b)) for b in style.split("@media")[:2]]
    light, dark = blocks
    assert {name: light[name] for name in PALETTE} == PALETTE
    assert light.keys() == dark.keys()
    for scheme in blocks:
        for name in ("ink", "muted", "link", "good", "bad", "unclear", "fusion"):
            for ground in ("ground", "soft"):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)
        for name in PALETTE:
            if name not in ("plot-grid", "plot-ground"):
                assert contrast(scheme[name], scheme["plot-ground"]) >= 3, name


def test_without_perplexity_toxicity_is_drawn_alone():
    document = results()
    for item in document["settings"]:
        item["perplexity"] = None
    panels = tradeoff_panels(Run(document))
    assert len(panels) == 2
    assert "default, fusion: 11.2\u202f%" in panels[0].description


def test_types_are_drawn_where_a_scorer_has_several():
    document = results()
    assert type_panels(Run(document)) == []
    for item in document["settings"]:
        item["toxicity"]["lexical"]["identity_attack"] = measure(0.05)
    (panel,) = type_panels(Run(document))
    assert "identity attack, target alone: 5.0\u202f%" in panel.description
