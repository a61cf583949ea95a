"""Model cards from Jinja templates, and the Markdown that every card needs.

A card quotes values that cannot be trusted, such as names, commands and training records. Every
value that a template prints is therefore escaped with :func:`inline`, unless a function of this
module has already made it :class:`Markdown`. A value can thus add no image, link or HTML to a card,
and no terminal escape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fusion_detox.files.printable import printable, printable_json

# As entities they are never markup, whatever precedes them.
_ENTITIES = str.maketrans({"<": "&lt;", "[": "&#91;", "]": "&#93;"})


class Markdown(str):
    """Finished Markdown, which a template prints unchanged."""

    __slots__ = ()


def render_card(template: Path, **values: Any) -> str:
    """The text of a model card; consecutive blank lines become one."""
    text = _ENVIRONMENT.from_string(template.read_text(encoding="utf-8")).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def front_matter(values: Mapping[str, Any]) -> Markdown:
    """The YAML block at the top of a card: scalars, and lists of scalars."""
    lines = []
    for name, value in values.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {yaml_text(item)}" for item in value)]
        else:
            lines.append(f"{name}: {yaml_text(value)}")
    return Markdown("\n".join(["---", *lines, "---"]))


def yaml_text(value: Any) -> str:
    """A string, number or boolean as a YAML 1.1 scalar on one line.

    Strings are always quoted, so that ``no``, ``1e3`` or ``a: b`` remain strings.
    """
    if not isinstance(value, str):
        return json.dumps(value)
    # YAML reads some of these characters as line breaks and forbids the others.
    return re.sub(r"[\ufeff\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", printable_json(value))


def plain_text(value: Any) -> str:
    """A JSON value as short text: ``{"a": [1, None]}`` becomes ``a 1, none``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain_text, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def inline(value: Any) -> str:
    """A value on one line, as text: without HTML, links, images or a way out of its markup."""
    if isinstance(value, Markdown):
        return value
    return printable(" ".join(plain_text(value).split())).translate(_ENTITIES)


def table(rows: Iterable[Iterable[Any]], header: Sequence[Any] = ("", "")) -> Markdown:
    """A Markdown table."""
    lines = [_row(header), f"|{'---|' * len(header)}", *map(_row, rows)]
    return Markdown("\n".join(lines))


def records_table(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """A Markdown table with one column for each name that occurs in any row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return table(([row.get(name, "") for name in names] for row in rows), names)


def console_block(command: str) -> Markdown:
    """A fenced code block whose fence is longer than any inside the command."""
    command = printable(command)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return Markdown(f"{fence}console\n{command.strip()}\n{fence}")


def python_string(value: str) -> Markdown:
    """A string literal for a Python example."""
    return Markdown(printable_json(value))


def _row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(inline(cell).replace('|', chr(92) + '|') for cell in cells)} |"


_ENVIRONMENT = Environment(
    autoescape=False,  # that would escape HTML only; finalize escapes Markdown too
    finalize=inline,
    lstrip_blocks=True,
    trim_blocks=True,
    undefined=StrictUndefined,
)
for _function in (table, records_table, console_block, python_string):
    _ENVIRONMENT.globals[_function.__name__] = _function
