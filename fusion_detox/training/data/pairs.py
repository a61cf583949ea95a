"""Read paraphrase sets: sentences in toxic and non-toxic wordings, for contrastive training.

Besides the library's own format, two published formats are read: ParaDetox (Logacheva et al. 2022)
and the dialogues of Anthropic's HH-RLHF (Bai et al. 2022, arXiv 2204.05862). Some of their rows
have equal or empty sides; these rows are skipped and logged. In the library's own format, such a
row is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
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
        anchor: The sentence that the wordings paraphrase.
        positives: Non-toxic wordings; these include the anchor only if it is listed.
        negatives: Toxic wordings.
        prompt: Text before each wording, such as a dialogue; it is read but not learned.
        provenance: JSON-ready facts about the source, such as model, settings and scores.
    """

    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    prompt: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """A hash of the content without provenance, the same on every machine."""
        content = [self.prompt, self.anchor, [*self.positives], [*self.negatives]]
        return hashlib.md5(json.dumps(content).encode()).hexdigest()

    def to_row(self) -> dict[str, Any]:
        """Convert to a row of the library's own format."""
        row: dict[str, Any] = {
            "anchor": self.anchor,
            "positives": list(self.positives),
            "negatives": list(self.negatives),
        }
        if self.prompt:
            row["prompt"] = self.prompt
        return {**row, "provenance": dict(self.provenance)}


def read_pairs(sources: Sequence[str | Path]) -> list[ParaphraseSet]:
    """Read all paraphrase sets of files, folders or hub data sets, in order.

    The fields of a row determine its format:

    - ``anchor``, ``positives``, ``negatives``, and optionally ``prompt`` and ``provenance``: the
      library's own.
    - ``toxic``, ``neutral``: ParaDetox; the first neutral wording becomes the anchor.
    - ``chosen``, ``rejected``: HH-RLHF; the shared dialogue becomes the prompt and the chosen
      answer the anchor.

    A single text counts as a list of one. Duplicates on one side are removed.

    Args:
        sources: Files (``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv``, each also followed
            by ``.gz``), folders of such files, or hub ids ``org/name[:split]``.

    Raises:
        DataFileError: A file does not exist or cannot be read.
        DataError: A file is empty or malformed, a row has none of the three formats, a text is
            empty or not text, an anchor lacks positives or negatives, or a positive equals a
            negative.
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
        raise DataError(f"{source} holds no paraphrase set{reason}; choose another source")
    if flawed:
        logger.warning("%s: %d unusable rows were skipped: %s", source, len(flawed), shown)
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
    anchor = _text(row["anchor"], "anchor", where)
    prompt = row.get("prompt")
    prompt = "" if prompt is None else _string(prompt, "prompt", where)
    positives = _wordings(row["positives"], "positives", where)
    negatives = _wordings(row["negatives"], "negatives", where)
    for name, side in (("positives", positives), ("negatives", negatives)):
        if not side:
            raise DataError(
                f"{where}: the anchor {_shown(anchor)} has no {name}; give at least one, or remove "
                "the row"
            )
    folded = set(map(fold, negatives))
    if both := next((text for text in positives if fold(text) in folded), None):
        raise DataError(
            f"{where}: {_shown(both)} is both a positive and a negative (ignoring white space); "
            "remove it from one side"
        )
    provenance = row.get("provenance") or {}
    if not isinstance(provenance, Mapping):
        raise DataError(
            f"{where}: provenance must be an object, but is {_shown(provenance)}; fix the row"
        )
    return ParaphraseSet(anchor, positives, negatives, prompt, provenance)


def _published(row: Mapping[str, Any], form: str, where: str) -> ParaphraseSet | str:
    """The paraphrase set of a published row, or the reason why the row is unusable."""
    if form == PARADETOX:
        prompt, toxic = "", _string(row["toxic"], "toxic", where)
        neutral = [_string(text, "neutral", where) for text in _listed(row["neutral"])]
    else:
        chosen, rejected = (_string(row[name], name, where) for name in _FORMS[HH_HARMLESS])
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - by character
        border = shared.rfind(_ANSWER)
        if border < 0:
            return f"the two dialogues share no turn that ends in {_ANSWER!r}"
        border += len(_ANSWER)
        # The space after the colon belongs to the answer, as a model generates it.
        prompt, neutral, toxic = chosen[:border], [chosen[border:]], rejected[border:]
    if not toxic.strip() or not any(text.strip() for text in neutral):
        return "one side is empty"
    positives = _distinct(text for text in neutral if text.strip() and fold(text) != fold(toxic))
    if not positives:
        return "both sides are equal"
    return ParaphraseSet(positives[0], positives, (toxic,), prompt, {"form": form})


def fold(text: str) -> str:
    """Replace each run of white space by one space; equal results mean equal wordings."""
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


def _text(value: Any, name: str, where: str) -> str:
    text = _string(value, name, where)
    if not text.strip():
        raise DataError(f"{where}: {name} holds an empty text; remove it, or remove the row")
    return text


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must hold text, but holds {_shown(value)}; fix the row")
    return value


def _shown(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"
