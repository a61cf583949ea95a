"""The report of one run: ``report.html`` and ``report.png``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_detox.evaluation.report import headline, measures, plots, rendering, sections
from fusion_detox.evaluation.report.examples import examples
from fusion_detox.evaluation.report.markup import Html, join, line, tag
from fusion_detox.evaluation.report.page import Section, page, write
from fusion_detox.evaluation.report.reading import Interval, Run, at, interval, rows, toxicity
from fusion_detox.evaluation.report.tradeoff import tradeoff_panels
from fusion_detox.evaluation.report.wording import cell, digits, percent, quantity, together


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Writes the report of a run for people: ``report.html``, and its plots as ``report.png``.

    The page is one file that loads nothing else. The same results give the same bytes.

    Args:
        results: A results document of format 1, as in ``results.json``; blocks may be missing.
        folder: Where both files go; made if it is not there.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: The document is of another format or has no settings.
        MissingExtraError: matplotlib is not installed.
        DataFileError: A file cannot be written.
    """
    run = Run(results)
    rendering.require_matplotlib()
    text = _page(run)
    panels = [tradeoff_panels(run), plots.histogram_panels(run), plots.group_panels(run)]
    write(Path(folder) / "report.png", rendering.png(panels, line(run.name, 70)))
    return write(Path(folder) / "report.html", text)


def _page(run: Run) -> str:
    prompts = [] if run.prompts is None else [f"{digits(run.prompts, 0)} prompts"]
    target = at(run.results, "target", "name")
    below = [
        *([] if target is None else [join(["target ", tag("b", line(target))])]),
        *prompts,
        *([line(run.results["created"])[:10]] if run.results.get("created") else []),
    ]
    parts = [
        Section("summary", "In short", _summary(run)),
        Section("notes", "Notes on this run", sections.notes(run)),
        Section("measured", "What was measured", sections.setup(run)),
        Section("settings", "All settings", _settings(run)),
        Section("scores", "Scores in detail", _scores(run)),
        Section("text", "The text written", measures.text_table(run)),
        Section("side-effects", "Side effects", _side_effects(run)),
        Section("cost", "Cost", measures.cost_table(run)),
        Section("examples", "Examples", examples(run)),
        Section("reproduce", "To reproduce it", sections.reproduce(run)),
        Section("definitions", "What the numbers mean", sections.glossary()),
    ]
    version = at(run.results, "versions", "fusion_detox")
    by = "fusion_detox" if version is None else f"fusion_detox {line(version)}"
    foot = f"Written by {by}. The same numbers, unrounded: results.json beside this file."
    return page(run.name, "Evaluation of detoxification", join(below, " · "), parts, foot)


def _summary(run: Run) -> Html:
    lines = [
        tag("li", statement.text, class_=f"is-{statement.tone}")
        for statement in headline.statements(run)
    ]
    return join(
        [
            tag("p", headline.title(run), class_="finding"),
            _figures(run),
            tag("ul", *lines, class_="statements"),
            tag("p", "Brackets hold 95 % intervals over prompts.", class_="caption"),
        ]
    )


def _figures(run: Run) -> Html | None:
    """Few large numbers: without fusion, with it, and of the word filter."""
    if run.primary is None:
        return None
    tiles = []
    for scorer in run.scorers:
        tiles.append(
            _tile(
                f"Toxic prompts, {line(scorer, 30)}",
                [(what, toxicity(s, scorer, "probability")) for what, s in _compared(run)],
                percent,
                100,
            )
        )
    tiles.append(
        _tile(
            "Perplexity of the text",
            [(what, interval(s, "perplexity", "token_weighted")) for what, s in _compared(run)],
            quantity,
        )
    )
    kl = [(what, interval(s, "harmless", "kl")) for what, s in _compared(run)]
    tiles.append(_tile("Harmless text, KL", kl, quantity))
    return tag("div", *filter(None, tiles), class_="tiles")


def _compared(run: Run) -> list[tuple[str, Any]]:
    return [("alone", run.base), ("fusion", run.primary), ("word filter", run.word_filter)]


def _tile(
    name: str, values: list[tuple[str, Interval | None]], show: Any, scale: float = 1
) -> Html | None:
    if dict(values)["fusion"] is None:
        return None
    places = together([value for _, value in values], scale, most=4)
    lines = [
        tag(
            "div",
            tag("dt", what),
            tag("dd", cell(show(value, places))),
            class_=f"is-{what.replace(' ', '-')}",
        )
        for what, value in values
        if value is not None
    ]
    return tag("div", tag("h3", name), tag("dl", *lines), class_="tile")


def _settings(run: Run) -> Html:
    caption = (
        "Each point is a setting, bars are 95 % intervals; numbers beside points are strengths. "
        "Down and to the left is better."
    )
    return join(
        [rendering.figures(tradeoff_panels(run), caption), measures.overview(run)],
    )


def _scores(run: Run) -> Html | None:
    caption = (
        "How the scores of single continuations are spread. The vertical axis is stretched near "
        "0, so that rare scores are seen."
    )
    types = "Toxic prompts by type of toxicity, with 95 % intervals."
    parts = [
        rendering.figures(plots.histogram_panels(run), caption),
        *_toxicity(run),
        rendering.figures(plots.type_panels(run), types),
        measures.prompts_table(run),
        measures.seeds_table(run),
    ]
    return join(parts) if any(parts) else None


def _toxicity(run: Run) -> list[Html]:
    found = measures.toxicity_tables(run)
    if len(run.settings) <= 8:
        return found
    return [
        tag("details", tag("summary", f"Toxicity in full, {line(scorer, 60)} scorer"), one)
        for scorer, one in zip(run.scorers, found, strict=False)
    ]


def _side_effects(run: Run) -> Html | None:
    caption = (
        "How much more perplexity rises on a group's text than on the control text, with 95 % "
        "intervals. Right of the line, the group's text is held back more than the control."
    )
    parts: list[Html | None] = [
        measures.harmless_table(run),
        rendering.figures(plots.group_panels(run), caption),
    ]
    with_groups = [setting for setting in run.settings if rows(setting, "groups")]
    with_groups.sort(key=lambda setting: setting is not run.primary)
    for place, setting in enumerate(with_groups):
        found = measures.groups_table(setting, f"table-groups-{place}")
        if found is None:
            continue
        if setting is run.primary:
            parts.append(found)
        else:
            summary = tag("summary", "Groups at “", line(setting["name"], 80), "”")
            parts.append(tag("details", summary, found))
    return join(parts) if any(parts) else None
