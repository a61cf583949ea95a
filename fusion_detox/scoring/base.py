"""The interface of toxicity scorers, and batching that limits a failure to a single text."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fusion_detox.config import check_number
from fusion_detox.errors import DataError, FusionDetoxError

logger = logging.getLogger(__name__)

TOXICITY = "toxicity"
"""The type that every scorer reports; its score is the main score."""

_LOGGED_FAILURES = 20


class ScoringError(FusionDetoxError, ValueError):
    """A scorer cannot continue."""


class NoTextScoredError(ScoringError):
    """A scorer could not score any of the texts."""


class Scorer(Protocol):
    """Scores texts. Any object with these methods is a scorer.

    A blank text has toxicity 0.
    """

    name: str
    """Unique among the scorers of a run, and usable as a file name."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """Toxicity of each text, from 0 to 1, or nan if it could not be scored."""
        return self.score_types(texts)[TOXICITY]

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """Scores per text for each type of toxicity, including ``"toxicity"``."""
        ...

    def record(self) -> dict[str, Any]:
        """JSON-ready facts: model, version or weights hash, licence, known AUCs, truncation.

        Scorers with equal records give equal scores, so settings that do not change a score are
        left out.
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
    """Scores each distinct text once, in batches of similar length.

    If a batch fails, its texts are scored one by one. A text that fails gets nan, and a warning
    quotes its beginning and gives the reason. This library's own errors are not failures of a text;
    they are raised.

    Args:
        score_batch: Returns, for each type, one score from 0 to 1 per text.
        texts: The texts. Blank texts are not passed to ``score_batch``.
        name: The scorer's name, for messages.
        types: The types that ``score_batch`` returns.
        batch_size: Texts per batch.
        blank: Scores of a blank text, for types whose score is not 0.

    Raises:
        NoTextScoredError: Every text failed.
        DataError: ``texts`` is a single string, or an item is not a string.
        ConfigError: ``batch_size`` is below 1.
    """
    check_number("batch_size", batch_size, 1, whole=True)
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
        except Exception as error:  # noqa: BLE001 - a model may raise anything
            if len(batch) == 1:
                failures[batch[0]] = _reason(error)
                continue
            rows = []
            logger.info("%s: scoring a batch text by text: %s", name, _reason(error))
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
    """Raises ``DataError`` unless ``texts`` is a sequence of strings."""
    if isinstance(texts, str):
        raise DataError(f"texts must be a list, but is a single text: {beginning(texts)}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {index} must be a string, but is a {type(text).__name__}")


def beginning(text: str, limit: int = 40) -> str:
    """The quoted beginning of a text, for a message."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def file_safe(text: str) -> str:
    """A file name made of letters, digits, ``.``, ``_`` and ``-`` only."""
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
        logger.warning("%s could not score %d texts in total", name, len(failures))
    if all_failed:
        text, reason = next(iter(failures.items()))
        raise NoTextScoredError(
            f"{name} could not score any of {len(failures)} texts; the reason for "
            f"{beginning(text)} was: {reason}. Fix this, or choose another scorer."
        )
