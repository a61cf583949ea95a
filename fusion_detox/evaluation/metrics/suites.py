"""Suites of harmless texts, which fusion should change little and equally for every group.

Four suites are built in. They were written for this package (Apache-2.0), and the ``record`` of
each states its limits:

- ``identity``: template sentences that name a group of people, paired with the same sentences about
  people with a neutral name (Dixon et al. 2018; Xu et al. 2021).
- ``dialect``: sentences in African American English, each paired with its Standard American English
  version. They are *constructed* from features in the linguistics literature (Green 2002; Rickford
  1999), not collected from speakers. A difference shows that grammar is treated differently; no
  difference does not show that real texts of the dialect are treated equally.
- ``benign``: harmless requests that sound unsafe or mention a group, for refusals (modelled on the
  categories of XSTest, Röttger et al. 2024).
- ``general``: everyday English on varied topics.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.evaluation.metrics.statistics import Resamples, mean_interval
from fusion_detox.files.tables import LINE, Row, read_table, text_field, without_gz
from fusion_detox.scoring.refusals import is_refusal

logger = logging.getLogger(__name__)
_DATA = Path(__file__).with_name("data")
_NAMED = ("ident_neutral_nh", "ident_pos_nh")
"""HateCheck's harmless cases that name a group, besides its counter speech (``counter_*``)."""


@dataclasses.dataclass(frozen=True)
class SuiteText:
    """One harmless text.

    Attributes:
        text: The text, never blank.
        group: The group that the text is about, or whose dialect it is; ``None`` for no group.
        pair: Texts with the same pair are versions of one sentence for different groups.
        control: Whether groups are compared with this text.
        label: The kind of group (``identity``), the feature (``dialect``), why the text sounds
            unsafe (``benign``) or the functionality (HateCheck).
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
        name: Name of the suite, or of the file without its suffix.
        texts: At least one text.
        record: JSON-ready: ``file``, ``sha256`` (first 16 hex digits), and for built-in suites
            ``description``, ``licence``, ``origin``, ``references`` and ``limits``.
    """

    name: str
    texts: tuple[SuiteText, ...]
    record: dict[str, Any]

    def group_names(self) -> tuple[list[str], str | None]:
        """The group of each text, and the name of the control group if there is one."""
        given = {text.group or "control" for text in self.texts if text.control}
        control = given.pop() if len(given) == 1 else "control" if given else None
        names = [
            control if text.control and control else text.group or self.name for text in self.texts
        ]
        return names, control

    def spread(self, limit: int | None) -> Suite:
        """The suite with at most ``limit`` texts, spread evenly over it; pairs stay complete.

        Args:
            limit: The number of texts; ``None`` for all. At least one pair or text is kept.
        """
        units: dict[object, list[SuiteText]] = {}
        for number, text in enumerate(self.texts):
            units.setdefault(number if text.pair is None else text.pair, []).append(text)
        largest = max(map(len, units.values()))
        count = len(units) if limit is None else max(1, min(limit // largest, len(units)))
        every = list(units.values())
        kept = [every[number * len(every) // count] for number in range(count)]
        return dataclasses.replace(self, texts=tuple(text for unit in kept for text in unit))

    def digest(self) -> str:
        """10 hex digits that identify the texts."""
        rows = [[text.text, text.group, text.pair, text.control] for text in self.texts]
        content = json.dumps(rows).encode("utf-8", "surrogatepass")
        return hashlib.sha256(content).hexdigest()[:10]


def load_suite(name: str) -> Suite:
    """Loads a built-in suite; see the module's docstring.

    Raises:
        ConfigError: The suite does not exist.
        DataFileError: The suite's file is missing or damaged.
    """
    if name not in _BUILT_IN:
        raise ConfigError(
            f"there is no suite {name!r}; choose from {', '.join(_BUILT_IN)}. For your own file, "
            "use suite_from_file"
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
    """Reads your own harmless texts.

    Args:
        path: JSON Lines or CSV with ``text`` and optionally ``group``, ``control`` (true for texts
            that groups are compared with), ``pair`` and ``label``; or one text per line.

    Raises:
        DataFileError: The file is missing, a folder, or cannot be read.
        DataError: The file is damaged or empty, or a field has an invalid value.
    """
    place = Path(path).expanduser()
    table = read_table(place)
    texts = []
    for row in table.rows:
        text = text_field(row, LINE if table.form == "lines" else "text")
        if not text.strip():
            raise DataError(f"{row.where}: the text is blank; remove the row")
        group, pair, label = (_optional(row, name) for name in ("group", "pair", "label"))
        texts.append(SuiteText(text, group, pair, _flag(row, "control"), label))
    return Suite(without_gz(place).stem, tuple(texts), {"file": place.name, "sha256": table.sha256})


def hatecheck_suite(path: str | os.PathLike[str]) -> Suite:
    """Reads the non-hateful cases of HateCheck that name a group (Röttger et al. 2021).

    Groups are the targets of neutral and positive statements and of counter speech. The control
    texts are the non-hateful cases that name no group. Some of these swear, or abuse objects and
    individuals, so fusion may rightly change them more than the groups' texts.

    Args:
        path: HateCheck as published (CSV with ``functionality``, ``test_case``, ``label_gold`` and
            ``target_ident``) or as JSON Lines (``functionality``, ``text``, ``label``, ``target``).

    Raises:
        DataFileError: The file is missing, a folder, or cannot be read.
        DataError: The file is damaged, lacks a field, or has no such case.
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


def refusal(suite: str, answers: Sequence[Sequence[str]], draws: Resamples) -> dict[str, Any]:
    """How often a model refuses the prompts of a suite, as in ``results.json``.

    Args:
        suite: Name of the suite.
        answers: The answers to each prompt. An empty answer is not a refusal; a prompt without
            answers is left out.
        draws: Resamples of the same number of prompts.

    Returns:
        ``suite``, the number of ``prompts``, and ``rate``: the share of refusals among a prompt's
        answers, averaged over prompts, with its interval.
    """
    shares = [
        sum(map(is_refusal, texts)) / len(texts) if texts else float("nan") for texts in answers
    ]
    return {"suite": suite, "prompts": len(answers), "rate": mean_interval(shares, draws)}


def _identity(values: dict[str, Any]) -> Iterator[SuiteText]:
    for number, template in enumerate(values["templates"]):
        pair = f"identity-{number:02}"
        for group in values["groups"]:
            text = _fill(template, group)
            yield SuiteText(text, group["group"], pair, label=group["label"])
        for control in values["controls"]:
            yield SuiteText(_fill(template, control), None, pair, control=True)


def _fill(template: str, names: dict[str, str]) -> str:
    """Fills ``{plural}`` and ``{person}``; a capitalised placeholder capitalises the name."""
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


_BUILT_IN = {"benign": _benign, "dialect": _dialect, "general": _general, "identity": _identity}


def _optional(row: Row, name: str) -> str | None:
    return (text_field(row, name) or None) if name in row.values else None


def _flag(row: Row, name: str) -> bool:
    value = row.values.get(name)
    if isinstance(value, str):  # CSV holds text only
        value = {"true": True, "false": False, "": None}.get(value.strip().lower(), value)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise DataError(f"{row.where}: field {name!r} must be true or false, but is {value!r}")
