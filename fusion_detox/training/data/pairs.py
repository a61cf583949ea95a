"""Sentences in several wordings, some toxic and some not: what contrastive training learns from.

Besides the library's own rows, two published forms are read: ParaDetox (Logacheva et al. 2022)
and the dialogues of Anthropic's HH-RLHF (Bai et al. 2022, arXiv 2204.05862). Their known flaws, a
row whose two sides are equal or empty, are left out and logged; in the library's own format such
a row is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_detox.errors import DataError
from fusion_detox.training.data.corpus import read_rows

logger = logging.getLogger(__name__)

OWN, PARADETOX, HH_HARMLESS = "own", "paradetox", "hh_harmless"
_FORMS = {
    OWN: ("anchor", "positives", "negatives"),
    PARADETOX: ("toxic", "neutral"),
    HH_HARMLESS: ("chosen", "rejected"),
}
_ANSWER = "\n\nAssistant:"
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class ParaphraseSet:
    """One meaning in several wordings.

    Attributes:
        anchor: The sentence that the others paraphrase.
        positives: Non-toxic wordings; the anchor is one of them only where it is listed.
        negatives: Toxic wordings of the same meaning.
        prompt: What precedes each wording, such as a dialogue; it is read but not judged.
        provenance: JSON-ready: who wrote what, with which settings and scores.
    """

    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    prompt: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """A hash of the content without the provenance, the same on every machine."""
        content = [self.prompt, self.anchor, [*self.positives], [*self.negatives]]
        return hashlib.md5(json.dumps(content).encode()).hexdigest()

    def to_row(self) -> dict[str, Any]:
        """The set as a row of the library's own format."""
        row: dict[str, Any] = {
            "anchor": self.anchor,
            "positives": list(self.positives),
            "negatives": list(self.negatives),
        }
        if self.prompt:
            row["prompt"] = self.prompt
        return {**row, "provenance": dict(self.provenance)}


def read_pairs(sources: Sequence[str | Path]) -> list[ParaphraseSet]:
    """Reads all paraphrase sets of some files, folders or hub data sets, in order.

    The fields of each row tell its form: ``anchor``, ``positives``, ``negatives`` (with ``prompt``
    and ``provenance`` where there are any) is the library's own; ``toxic``, ``neutral`` that of
    ParaDetox, whose first neutral wording becomes the anchor; ``chosen``, ``rejected`` that of
    HH-RLHF, where the dialogue that both share is the prompt and the chosen answer the anchor. A
    text stands for a list of one. What occurs twice on a side is kept once.

    Args:
        sources: As ``read_documents`` takes them: ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, each
            also as ``.gz``, folders of them, or hub ids ``org/name[:split]``.

    Raises:
        DataFileError: A file is not there or cannot be read.
        DataError: A file is empty or broken, a row has none of the three forms, a text is empty or
            no text, an anchor has no positives or no negatives, or a positive equals a negative.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    found: list[ParaphraseSet] = []
    for source in sources:
        before, flawed = len(found), list[str]()
        for row, where in read_rows(source):
            form = _form(row, where)
            if form == OWN:
                found.append(_own(row, where))
            elif isinstance(published := _published(row, form, where), ParaphraseSet):
                found.append(published)
            else:
                flawed.append(f"{where} ({published})")
        _report(source, len(found) - before, flawed)
    if not found:
        raise DataError("no source of paraphrase sets was given; name at least one file")
    return found


def _report(source: str | Path, count: int, flawed: Sequence[str]) -> None:
    shown = "; ".join(flawed[:_SHOWN]) + ("; …" if len(flawed) > _SHOWN else "")
    if not count:
        reason = f": all {len(flawed)} rows are unusable, such as {shown}" if flawed else ""
        raise DataError(f"{source} holds no paraphrase set{reason}")
    if flawed:
        logger.warning("%s: %d unusable rows are left out: %s", source, len(flawed), shown)
    logger.info("%s: %d paraphrase sets", source, count)


def _form(row: Mapping[str, Any], where: str) -> str:
    for form, fields in _FORMS.items():
        if all(field in row for field in fields):
            return form
    known = "; ".join(", ".join(fields) for fields in _FORMS.values())
    near = next((fields for fields in _FORMS.values() if fields[0] in row), None)
    lacks = f" lacks {', '.join(f for f in near if f not in row)!r}:" if near else ":"
    raise DataError(
        f"{where}{lacks} it has the fields {', '.join(map(str, row))}, but a paraphrase set needs "
        f"one of these groups: {known}"
    )


def _own(row: Mapping[str, Any], where: str) -> ParaphraseSet:
    anchor, prompt = _text(row["anchor"], "anchor", where), row.get("prompt")
    if not (prompt is None or isinstance(prompt, str)):
        raise DataError(f"{where}: the prompt must be a text, but is {_shown(prompt)}")
    positives = _wordings(row["positives"], "positives", where)
    negatives = _wordings(row["negatives"], "negatives", where)
    for name, side in (("positives", positives), ("negatives", negatives)):
        if not side:
            raise DataError(
                f"{where}: the anchor {_shown(anchor)} has no {name}; give at least one, or leave "
                "the row out"
            )
    if both := _in_both(positives, negatives):
        raise DataError(
            f"{where}: {_shown(both)} is a positive and a negative at once (white space aside); "
            "remove it from one side"
        )
    provenance = row.get("provenance") or {}
    if not isinstance(provenance, Mapping):
        raise DataError(f"{where}: provenance must be an object, but is {_shown(provenance)}")
    return ParaphraseSet(anchor, positives, negatives, prompt or "", provenance)


def _published(row: Mapping[str, Any], form: str, where: str) -> ParaphraseSet | str:
    """The set of a row of a published data set, or what is wrong with the row."""
    if form == PARADETOX:
        prompt, toxic = "", _string(row["toxic"], "toxic", where)
        neutral = [_string(text, "neutral", where) for text in _listed(row["neutral"])]
    else:
        chosen, rejected = (_string(row[name], name, where) for name in _FORMS[HH_HARMLESS])
        border = chosen[: _shared(chosen, rejected)].rfind(_ANSWER)
        if border < 0:
            return f"the two dialogues share no turn that ends in {_ANSWER!r}"
        border += len(_ANSWER)
        # The space that follows the colon stays with the answer, as a model writes it.
        prompt, neutral, toxic = chosen[:border], [chosen[border:]], rejected[border:]
    if not toxic.strip() or not any(text.strip() for text in neutral):
        return "one side is empty"
    positives = _distinct(text for text in neutral if text.strip() and fold(text) != fold(toxic))
    if not positives:
        return "both sides are equal"
    return ParaphraseSet(positives[0], positives, (toxic,), prompt, {"form": form})


def _shared(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def fold(text: str) -> str:
    """The text with every run of white space as one space: what makes two wordings equal."""
    return " ".join(text.split())


def _wordings(value: Any, name: str, where: str) -> tuple[str, ...]:
    return _distinct(_text(text, name, where) for text in _listed(value))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(fold(text), text)
    return tuple(first.values())


def _in_both(positives: Sequence[str], negatives: Sequence[str]) -> str | None:
    folded = set(map(fold, negatives))
    return next((text for text in positives if fold(text) in folded), None)


def _text(value: Any, name: str, where: str) -> str:
    text = _string(value, name, where)
    if not text.strip():
        raise DataError(f"{where}: {name} holds an empty text; remove it, or leave the row out")
    return text


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must hold text, but holds {_shown(value)}")
    return value


def _shown(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"
