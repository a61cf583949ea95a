"""Harmless texts on which fusion should change little, and for every group equally little.

Four suites come with the package, written for it (Apache-2.0), each with what it cannot show in its
``record``:

- ``identity``: template sentences that name a group of people, paired with the same sentences about
  people named by something neutral (Dixon et al. 2018; Xu et al. 2021).
- ``dialect``: sentences in African American English, each paired with the same in Standard American
  English. They are *constructed* from features in the linguistics literature (Green 2002;
  Rickford 1999), not collected from speakers: a difference shows that grammar is treated
  differently, and no difference does not show that real texts of the dialect are treated alike.
- ``benign``: harmless requests that sound unsafe or touch a group, for refusals (after the kinds of
  XSTest, Röttger et al. 2024).
- ``general``: everyday English of varied topics.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.files.tables import LINE, Row, read_table, text_field, without_gz

logger = logging.getLogger(__name__)
_DATA = Path(__file__).with_name("data")
_NAMED = ("ident_neutral_nh", "ident_pos_nh")
"""HateCheck's harmless cases that name a group, beside its counter speech (``counter_*``)."""


@dataclasses.dataclass(frozen=True)
class SuiteText:
    """One harmless text.

    Attributes:
        text: The text, never blank.
        group: Whom it is about, or whose dialect it is; ``None`` for no group.
        pair: Texts with the same pair say the same of another group or of none.
        control: Whether it is what groups are compared with.
        label: The kind of group (``identity``), the feature (``dialect``), why it sounds unsafe
            (``benign``) or the functionality (HateCheck).
    """

    text: str
    group: str | None = None
    pair: str | None = None
    control: bool = False
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """Harmless texts of one source.

    Attributes:
        name: Of the suite, or of the file without its suffix.
        texts: At least one.
        record: JSON-ready: ``file``, ``sha256`` (first 16 hex digits), and for built-in suites
            ``description``, ``licence``, ``origin``, ``references`` and ``limits``.
    """

    name: str
    texts: tuple[SuiteText, ...]
    record: dict[str, Any]

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that are compared with the control, in the order of the texts."""
        found = (text.group for text in self.texts if not text.control and text.group)
        return tuple(dict.fromkeys(found))

    @property
    def controls(self) -> tuple[SuiteText, ...]:
        """What groups are compared with; empty where the suite has no such texts."""
        return tuple(text for text in self.texts if text.control)

    def of(self, group: str) -> tuple[SuiteText, ...]:
        """The texts of one group, without controls."""
        return tuple(text for text in self.texts if text.group == group and not text.control)


def load_suite(name: str) -> Suite:
    """A suite that comes with the package, see the module's description.

    Raises:
        ConfigError: There is none of that name.
        DataFileError: Its file is missing, so the package is not wholly installed.
    """
    if name not in _BUILT_IN:
        raise ConfigError(
            f"there is no suite {name!r}; built in are {', '.join(_BUILT_IN)}. For a file of your "
            "own use suite_from_file"
        )
    path = _DATA / f"{name}.json"
    try:
        raw = path.read_bytes()
        values: dict[str, Any] = json.loads(raw)
    except (OSError, ValueError) as error:
        raise DataFileError(f"cannot read {path}: {error}; reinstall the package") from error
    facts = ("description", "licence", "origin", "references", "limits")
    record = {
        "file": path.name,
        "sha256": hashlib.sha256(raw).hexdigest()[:16],
        **{fact: values[fact] for fact in facts},
    }
    return Suite(name, tuple(_BUILT_IN[name](values)), record)


def suite_from_file(path: str | os.PathLike[str]) -> Suite:
    """Your own harmless texts.

    Args:
        path: JSON Lines (or CSV) with ``text`` and, where you have them, ``group``, ``control``
            (true for what groups are compared with), ``pair`` and ``label``; or a text a line.

    Raises:
        DataFileError: The file is missing, a folder, or cannot be read.
        DataError: It is broken, a field holds what it must not, or there is no text.
    """
    place = Path(path).expanduser()
    table = read_table(place)
    texts = []
    for row in table.rows:
        text = text_field(row, LINE if table.form == "lines" else "text")
        if not text.strip():
            raise DataError(f"{row.where}: the text is blank; leave the row out")
        group, pair, label = (_optional(row, name) for name in ("group", "pair", "label"))
        texts.append(SuiteText(text, group, pair, _flag(row, "control"), label))
    return Suite(without_gz(place).stem, tuple(texts), {"file": place.name, "sha256": table.sha256})


def hatecheck_suite(path: str | os.PathLike[str]) -> Suite:
    """The non-hateful cases of HateCheck that name a group (Röttger et al. 2021).

    Groups are the targets of neutral and positive statements and of counter speech. The control
    are the non-hateful cases that name no group. Some of these swear or abuse things and persons,
    so fusion may rightly change them more than the groups' texts.

    Args:
        path: HateCheck as published (CSV with ``functionality``, ``test_case``, ``label_gold`` and
            ``target_ident``) or as JSON Lines (``functionality``, ``text``, ``label``, ``target``).

    Raises:
        DataFileError: The file is missing, a folder, or cannot be read.
        DataError: It is broken, lacks a field, or has no such case.
    """
    place = Path(path).expanduser()
    table = read_table(place, as_lines=False)
    texts, others = [], 0
    for row in table.rows:
        functionality = text_field(row, "functionality")
        text = text_field(row, "test_case", "text")
        harmless = text_field(row, "label_gold", "label") == "non-hateful"
        group = text_field(row, "target_ident", "target") or None
        named = functionality in _NAMED or functionality.startswith("counter_")
        if harmless and text.strip() and (group is None or named):
            texts.append(SuiteText(text, group, control=group is None, label=functionality))
        else:
            others += 1
    if not any(text.group for text in texts):
        raise DataError(
            f"{place} has no non-hateful case that names a group ({', '.join(_NAMED)}, counter_*); "
            "give HateCheck's test cases"
        )
    logger.info("%s: %d cases, %d others left out", place, len(texts), others)
    return Suite("hatecheck", tuple(texts), {"file": place.name, "sha256": table.sha256})


def _identity(values: dict[str, Any]) -> Iterator[SuiteText]:
    for number, template in enumerate(values["templates"]):
        pair = f"identity-{number:02}"
        for group in values["groups"]:
            text = _fill(template, group)
            yield SuiteText(text, group["group"], pair, label=group["label"])
        for control in values["controls"]:
            yield SuiteText(_fill(template, control), None, pair, control=True)


def _fill(template: str, names: dict[str, str]) -> str:
    """A template with ``{plural}`` or ``{person}``, or either with a capital to begin with."""
    for key in ("plural", "person"):
        name = names[key]
        template = template.replace(f"{{{key}}}", name)
        template = template.replace(f"{{{key.capitalize()}}}", name[0].upper() + name[1:])
    return template


def _dialect(values: dict[str, Any]) -> Iterator[SuiteText]:
    for number, pair in enumerate(values["pairs"]):
        for kind, group in values["groups"].items():
            control = kind == "standard_american"
            yield SuiteText(pair[kind], group, f"dialect-{number:02}", control, pair["feature"])


def _benign(values: dict[str, Any]) -> Iterable[SuiteText]:
    return (SuiteText(p["text"], p["group"], label=p["label"]) for p in values["prompts"])


def _general(values: dict[str, Any]) -> Iterable[SuiteText]:
    return (SuiteText(text) for text in values["texts"])


def _optional(row: Row, name: str) -> str | None:
    return (text_field(row, name) or None) if name in row.values else None


def _flag(row: Row, name: str) -> bool:
    value = row.values.get(name)
    if isinstance(value, str):  # tables hold text only
        value = {"true": True, "false": False, "": None}.get(value.strip().lower(), value)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise DataError(f"{row.where}: field {name!r} must be true or false, but is {value!r}")


_BUILT_IN = {
    "benign": _benign,
    "dialect": _dialect,
    "general": _general,
    "identity": _identity,
}
