"""Tables that scroll inside their own box."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fusion_detox.evaluation.report.markup import Html, join, line, tag
from fusion_detox.evaluation.report.reading import (
    Run,
    block,
    interval,
    number,
)
from fusion_detox.evaluation.report.wording import (
    as_json,
    cell,
)

_MISSING = Html(
    '<span class="none" aria-hidden="true">–</span><span class="hidden">not measured</span>'
)
Value = Callable[[Mapping[str, Any]], "str | None"]  # of a setting; Html or text


@dataclass(frozen=True)
class Column:
    """A column; neighbours of the same group share a heading above theirs."""

    name: str
    value: Value
    group: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table: its heading, cells and CSS class. Without cells, it heads a part."""

    head: str
    cells: Sequence[str | None]
    class_: str | None = None


def table(
    ident: str,
    caption: object,
    corner: str,
    names: Sequence[tuple[str, str]],
    lines: Sequence[Row],
) -> Html | None:
    """A table in a box that scrolls; None where no cell has a value. Empty columns are left out.

    Args:
        ident: Id of the caption, unique in the page.
        caption: What the table shows.
        corner: Heading of the first column.
        names: For each further column its group ("" for none) and its name.
        lines: The lines.
    """
    kept = [
        i for i in range(len(names)) if any(row.cells and row.cells[i] is not None for row in lines)
    ]
    if not kept:
        return None
    head = _head(corner, [names[i] for i in kept])
    bodies: list[list[Html]] = [[]]
    for row in lines:
        if not row.cells:
            part = tag("th", row.head, scope="rowgroup", colspan=len(kept) + 1)
            bodies.append([tag("tr", part, class_="part")])
            continue
        cells = [tag("td", _MISSING if row.cells[i] is None else row.cells[i]) for i in kept]
        bodies[-1].append(tag("tr", tag("th", row.head, scope="row"), *cells, class_=row.class_))
    parts = [tag("tbody", *body) for body in bodies if body]
    inner = tag("table", head, *parts, aria_labelledby=ident)
    box = tag("div", inner, class_="scroll", role="region", aria_labelledby=ident, tabindex="0")
    # The caption stands outside, for it is not to scroll away with the table.
    return tag("div", tag("p", caption, id=ident, class_="caption"), box, class_="table")


def _head(corner: str, names: Sequence[tuple[str, str]]) -> Html:
    tall = 2 if any(group for group, _ in names) else None
    above: list[Html] = [tag("th", corner, scope="col", rowspan=tall)]
    below: list[Html] = []
    for group, members in groupby(names, key=lambda name: name[0]):
        columns = [_long(name) for _, name in members]
        if group:
            wide = len(columns)
            above.append(tag("th", _long(group), scope="colgroup", colspan=wide, class_="group"))
            below += [tag("th", name, scope="col") for name in columns]
        else:
            above += [tag("th", name, scope="col", rowspan=tall) for name in columns]
    return tag("thead", tag("tr", *above), tag("tr", *below) if below else None)


def _long(name: str) -> Html:
    return tag("span", name, class_="long") if len(name) > 24 else join([name])


def settings_table(run: Run, ident: str, caption: object, columns: Sequence[Column]) -> Html | None:
    """A line for each setting that has any of the values."""
    lines = []
    for setting in run.settings:
        cells = [column.value(setting) for column in columns]
        if any(value is not None for value in cells):
            lines.append(Row(setting_name(setting), cells, row_class(run, setting)))
    names = [(column.group, column.name) for column in columns]
    return table(ident, caption, "Setting", names, lines)


def setting_name(setting: Mapping[str, Any]) -> Html:
    """A setting's name, and below it what it is."""
    what = describe_config(setting) if setting.get("kind") == "fusion" else ""
    if setting.get("kind") == "base":
        what = "target alone"
    if setting.get("kind") == "wordfilter":
        what = "word filter"
    name = line(setting["name"])
    return join(
        [
            tag("span", name, class_="name"),
            tag("span", what, class_="what") if what and what != name else None,
        ]
    )


def row_class(run: Run, setting: Mapping[str, Any]) -> str | None:
    """How the line of a setting is set off."""
    if setting is run.base:
        return "is-base"
    return "is-primary" if setting is run.primary else None


def column(name: str, show: Callable[[Any], Any], group: str, *path: str) -> Column:
    """The interval at a path of a setting, shown by ``show``."""

    def value(setting: Mapping[str, Any]) -> str | None:
        found = interval(setting, *path)
        return cell(show(found)) if found else None

    return Column(name, value, group)


def describe_config(setting: Mapping[str, Any]) -> str:
    """What a setting is, in a few words."""
    config = block(setting, "config")
    parts = [str(config["rule"])] if config.get("rule") else []
    strength = number(config, "strength")
    if strength is not None:
        parts.append(f"strength {strength:g}")
    if number(config, "kl_budget") is not None:
        parts.append(f"KL budget {number(config, 'kl_budget'):g}")
    if number(config, "context_kl") is not None:
        parts.append(f"from {number(config, 'context_kl'):g} nats in the text")
    if parts:
        return line(", ".join(parts), 80)
    return line(as_json(dict(config)), 80) if config else ""
