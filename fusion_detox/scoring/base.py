"""What a scorer of toxicity is, and how a text that cannot be scored stays the only one."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fusion_detox.errors import ConfigError, DataError, FusionDetoxError

logger = logging.getLogger(__name__)

TOXICITY = "toxicity"
"""The type that every scorer has; its score is the main one."""

_LOGGED_FAILURES = 20


class ScoringError(FusionDetoxError, ValueError):
    """A scorer cannot go on: its service rejects or does not answer, or no text can be scored."""


class NoTextScoredError(ScoringError):
    """Not one of the texts could be scored."""


class Scorer(Protocol):
    """Judges texts; every scorer of this package is one, and so is any object with these methods.

    A text of white space only says nothing, and its toxicity is 0.
    """

    name: str
    """Unique among the scorers of a run, and fit for a file's name."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """Toxicity of each text in 0..1, or nan where it could not be scored."""
        return self.score_types(texts)[TOXICITY]

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """Each type of toxicity, ``"toxicity"`` among them, to one score a text as in ``score``."""
        ...

    def record(self) -> dict[str, Any]:
        """JSON-ready: model, version or weights hash, licence, AUCs where known, truncation.

        Scorers with equal records give equal scores; what does not change them is left out.
        """
        ...


def score_batches(
    score_batch: Callable[[list[str]], Mapping[str, Sequence[float]]],
    texts: Sequence[str],
    *,
    name: str,
    types: Sequence[str],
    batch_size: int,
    blank: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Scores in batches of similar length, each distinct text once; a failure stays with its text.

    A batch that fails is scored one by one. A text that fails is logged by its beginning and its
    reason, and gets nan. Errors of this library are no failure of a text and pass through.

    Args:
        score_batch: Gives for each type one score in 0..1 a text.
        texts: What to score; a text of white space only is not sent to ``score_batch``.
        name: The scorer's, for messages.
        types: The types that ``score_batch`` returns.
        batch_size: Texts a batch.
        blank: Scores of a text of white space only where they are not 0.

    Raises:
        NoTextScoredError: Every text failed.
        DataError: ``texts`` is one string, or holds something else than strings.
        ConfigError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, but is {batch_size}")
    check_texts(texts)
    said = sorted((text for text in dict.fromkeys(texts) if text.strip()), key=len)
    scores: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    for start in range(0, len(said), batch_size):
        batch = said[start : start + batch_size]
        try:
            rows = _rows(score_batch(batch), types, len(batch))
        except FusionDetoxError:
            raise
        except Exception as error:  # noqa: BLE001 - models of any make raise anything
            if len(batch) == 1:
                failures[batch[0]] = _reason(error)
                continue
            rows = []
            logger.info("%s: a batch is scored one by one: %s", name, _reason(error))
            for text in batch:
                try:
                    rows += _rows(score_batch([text]), types, 1)
                except FusionDetoxError:
                    raise
                except Exception as single:  # noqa: BLE001 - as above
                    failures[text] = _reason(single)
                    rows.append({})
        for text, row in zip(batch, rows, strict=True):
            wrong = {kind: value for kind, value in row.items() if not 0.0 <= value <= 1.0}
            if wrong:
                failures[text] = f"scores outside 0..1: {wrong}"
            elif row:
                scores[text] = row
    _report(name, failures, all_failed=bool(said) and not scores)
    empty = {kind: (blank or {}).get(kind, 0.0) for kind in types}
    failed = dict.fromkeys(types, math.nan)
    rows = [scores.get(text, failed) if text.strip() else empty for text in texts]
    return {kind: [row[kind] for row in rows] for kind in types}


def check_texts(texts: Sequence[str]) -> None:
    """Refuses with ``DataError`` what is no sequence of strings."""
    if isinstance(texts, str):
        raise DataError(f"texts must be a list of texts, but is one text: {beginning(texts)}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {index} must be a string, but is a {type(text).__name__}")


def beginning(text: str, limit: int = 40) -> str:
    """The first characters of a text, for a message."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def file_safe(text: str) -> str:
    """A name for files: letters, digits, ``.``, ``_`` and ``-`` only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text.replace("/", "--")).strip(".-") or "unnamed"


def _rows(
    found: Mapping[str, Sequence[float]], types: Sequence[str], count: int
) -> list[dict[str, float]]:
    if any(len(found[kind]) != count for kind in types):
        sizes = {kind: len(found[kind]) for kind in types}
        raise ValueError(f"{count} texts, but scores for {sizes}")
    return [{kind: float(found[kind][row]) for kind in types} for row in range(count)]


def _reason(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said[:300] or type(error).__name__


def _report(name: str, failures: Mapping[str, str], *, all_failed: bool) -> None:
    for text, reason in list(failures.items())[:_LOGGED_FAILURES]:
        logger.warning("%s could not score %s: %s", name, beginning(text), reason)
    if len(failures) > _LOGGED_FAILURES:
        logger.warning("%s could not score %d texts in all", name, len(failures))
    if all_failed:
        text, reason = next(iter(failures.items()))
        raise NoTextScoredError(
            f"{name} could score none of {len(failures)} texts; for {beginning(text)} the reason "
            f"was: {reason}. Mend that, or choose another scorer."
        )
