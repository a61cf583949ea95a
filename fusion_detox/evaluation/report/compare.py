"""Several runs side by side: ``comparison.html`` and the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusion_detox.errors import ConfigError, DataError
from fusion_detox.evaluation.report import rendering, sections
from fusion_detox.evaluation.report.comparable import Difference, differences, run_labels
from fusion_detox.evaluation.report.markup import Html, join, line, tag
from fusion_detox.evaluation.report.measures import COMPARED, probability_columns
from fusion_detox.evaluation.report.page import Section, page, write
from fusion_detox.evaluation.report.reading import (
    FORMAT,
    Interval,
    Run,
    finite,
    interval,
    rows,
    toxicity,
)
from fusion_detox.evaluation.report.rendering import PALETTE, Panel
from fusion_detox.evaluation.report.tables import Row, row_class, setting_name, table
from fusion_detox.evaluation.report.tradeoff import Point, Series, tradeoff_panel
from fusion_detox.evaluation.report.wording import cell, quantity

_COLOURS = [PALETTE[name] for name in ("fusion", "filter", *(f"other-{i}" for i in range(1, 5)))]
_FUSED = ("o", "^", "v", "P", "X", "p", "h", "<", ">")
_MARKERS = {"base": "D", "wordfilter": "s"}


def write_comparison(runs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes several runs side by side, and says where they cannot be compared.

    Args:
        runs: At least two results documents of format 1.
        path: The HTML file. The same numbers go beside it, with the ending ``.json``.

    Returns:
        ``path``.

    Raises:
        ConfigError: The file's name does not end in ``.html``.
        DataError: Fewer than two runs, or a document of another format or without settings.
        MissingExtraError: matplotlib is not installed.
        DataFileError: A file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"The comparison cannot be written to {str(path)!r}: it is a page, with its numbers "
            "beside it as .json; give a name that ends in .html."
        )
    if len(runs) < 2:
        raise DataError(
            f"{len(runs)} run{'' if len(runs) == 1 else 's'} cannot be compared; give at least two."
        )
    read = [Run(results) for results in runs]
    rendering.require_matplotlib()
    found = differences(read)
    text = _page(read, found)
    numbers = json.dumps(finite(_numbers(read, found)), indent=2, allow_nan=False)
    write(path.with_suffix(".json"), numbers + "\n")
    return write(path, text)


def _page(runs: Sequence[Run], found: Sequence[Difference]) -> str:
    labels = run_labels(runs)
    plots = rendering.figures(
        _panels(runs, labels),
        "Each point is a setting, bars are 95 % intervals. Diamonds: the target alone; squares: "
        "the word filter. Down and to the left is better.",
    )
    parts = [
        Section("comparable", "Can they be compared?", _differences(found)),
        Section("settings", "All settings", join([plots, _settings(runs, labels)])),
        Section("groups", "Groups", _groups(runs, labels)),
        Section("runs", "The runs", _runs(runs, labels)),
        Section("definitions", "What the numbers mean", sections.glossary()),
    ]
    return page(
        f"{len(runs)} runs side by side",
        "Comparison of evaluations",
        join((tag("b", label) for label in labels), " · "),
        parts,
        "The same numbers as JSON: the file of the same name beside this one.",
    )


def _differences(found: Sequence[Difference]) -> Html:
    warnings = [one for one in found if one.level == "warning"]
    if warnings:
        first = (
            f"Not without care: {len(warnings)} difference{'' if len(warnings) == 1 else 's'} "
            "between the runs make numbers incomparable."
            if len(warnings) > 1
            else "Not without care: a difference between the runs makes numbers incomparable."
        )
    else:
        first = (
            "Nothing was found that forbids it: prompts, sampling, threshold, target, scorers and "
            "perplexity model are the same."
        )
    items = [
        tag(
            "li",
            tag("strong", one.what[0].upper() + one.what[1:], ". "),
            one.sentence,
            _values(one),
            class_="is-bad" if one.level == "warning" else "is-plain",
        )
        for one in found
    ]
    return join(
        [
            tag("p", first, class_="finding"),
            tag("ul", *items, class_="statements") if items else None,
        ]
    )


def _values(one: Difference) -> Html | None:
    if not one.values:
        return None
    return tag(
        "dl",
        *(
            tag("div", tag("dt", label), tag("dd", line(value, 400)))
            for label, value in one.values.items()
        ),
        class_="facts differing",
    )


def _scorers(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.scorers))


def _settings(runs: Sequence[Run], labels: Sequence[str]) -> Html | None:
    columns = [*probability_columns(_scorers(runs)), *COMPARED]
    lines = []
    for run, label in zip(runs, labels, strict=True):
        lines.append(Row(tag("span", label, class_="name"), ()))
        lines += [
            Row(
                setting_name(setting),
                [column.value(setting) for column in columns],
                row_class(run, setting),
            )
            for setting in run.settings
        ]
    return table(
        "table-settings",
        "All settings of all runs, with 95 % intervals below the values. Against base: against the "
        "target alone of the same run.",
        "Run and setting",
        [(column.group, column.name) for column in columns],
        lines,
    )


def _panels(runs: Sequence[Run], labels: Sequence[str]) -> list[Panel]:
    panels = []
    for place, scorer in enumerate(_scorers(runs)):
        series = []
        for at_, (run, label) in enumerate(zip(runs, labels, strict=True)):
            colour = _COLOURS[at_ % len(_COLOURS)]
            points: dict[str, list[Point]] = {}
            for setting in run.settings:
                x = interval(setting, "perplexity", "token_weighted")
                y = toxicity(setting, scorer, "probability")
                if x is not None and y is not None:
                    marker = _MARKERS.get(str(setting.get("kind")), _FUSED[at_ % len(_FUSED)])
                    points.setdefault(marker, []).append(Point(x, y))
            order = sorted(points, key=lambda marker: marker in _MARKERS.values())
            series += [
                Series(line(label, 34), points[marker], colour, marker, joined=False, named=first)
                for marker, first in zip(order, [True, False, False], strict=False)
            ]
        if series:
            panels.append(tradeoff_panel(f"tradeoff-{place}", scorer, series))
    return panels


def _groups(runs: Sequence[Run], labels: Sequence[str]) -> Html | None:
    ratios: dict[tuple[str, str], dict[int, Interval]] = {}
    for place, run in enumerate(runs):
        for group in rows(run.primary, "groups"):
            ratio = interval(group, "ratio")
            if ratio is not None:
                key = line(group.get("suite") or "groups"), line(group.get("group"))
                ratios.setdefault(key, {})[place] = ratio
    lines = [
        Row(
            join([tag("span", group, class_="name"), tag("span", suite, class_="what")]),
            [
                cell(quantity(found[place], 3)) if place in found else None
                for place in range(len(runs))
            ],
        )
        for (suite, group), found in ratios.items()
    ]
    names = [
        ("", line(f"{label}, {run.primary['name']}" if run.primary else label, 60))
        for run, label in zip(runs, labels, strict=True)
    ]
    caption = (
        "Perplexity ratio of each group over that of its suite's control, at the setting "
        "that a column names. Above 1, the group's text is held back more."
    )
    return table("table-groups", caption, "Group", names, lines)


def _runs(runs: Sequence[Run], labels: Sequence[str]) -> Html:
    return join(
        join([tag("h3", label), sections.basics(run)])
        for run, label in zip(runs, labels, strict=True)
    )


def _numbers(runs: Sequence[Run], found: Sequence[Difference]) -> dict[str, Any]:
    labels = run_labels(runs)
    about = (
        "created",
        "target",
        "prompts",
        "sampling",
        "seeds",
        "threshold",
        "scorers",
        "versions",
    )
    kept = ("toxicity", "against_base", "perplexity", "diversity", "similarity", "harmless")
    return {
        "format": FORMAT,
        "runs": [
            {
                "run": label,
                "name": run.name,
                **{key: run.results.get(key) for key in (*about, "versions")},
            }
            for run, label in zip(runs, labels, strict=True)
        ],
        "differences": [asdict(one) for one in found],
        "settings": [
            {
                "run": label,
                **{key: setting.get(key) for key in ("name", "kind", "config", "calibrator")},
                **{key: setting.get(key) for key in (*kept, "groups", "refusal", "cost")},
            }
            for run, label in zip(runs, labels, strict=True)
            for setting in run.settings
        ],
    }
