"""A cache of scores on disk, so no scorer scores a text twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.journal import DamagedLineError, Journal
from fusion_detox.scoring.base import NoTextScoredError, Scorer, check_texts

logger = logging.getLogger(__name__)

# Seconds of scoring between two writes: the most work that a kill can lose.
_CHUNK_SECONDS = 5.0
_FIRST_CHUNK, _LARGEST_CHUNK = 8, 4096


class CachedScorer(Scorer):
    """A scorer that looks up the texts that it has scored before.

    The file is JSON Lines with ``scorer`` (a hash of the scorer's record), ``text`` (SHA-256 of the
    text) and ``scores`` (the score of each type). Several scorers may share a file, and a scorer
    whose record changes starts over. New rows are appended every few seconds, so a kill loses
    little. A torn last line is cut off. Several processes may share a file; each sees the others'
    rows. Scores of nan are not stored, so a failed text is tried again.

    Args:
        scorer: Scores the texts that the file lacks.
        path: The file. Its folder must exist.

    Raises:
        DataError: The file holds something else.
        DataFileError: The file cannot be read or written.
    """

    def __init__(self, scorer: Scorer, path: str | os.PathLike[str]) -> None:
        self.scorer, self.name, self.path = scorer, scorer.name, Path(path)
        if not self.path.parent.is_dir():
            raise DataFileError(
                f"the folder {self.path.parent} of the scores does not exist; create it"
            )
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        self._journal = Journal(self.path, "scorer")
        self._identity = _digest(json.dumps(scorer.record(), sort_keys=True))[:16]
        self._known: dict[str, dict[str, float]] = {}
        self._chunk = _FIRST_CHUNK
        with self._locked("read"):
            self._read_new_rows()

    def record(self) -> dict[str, Any]:
        """The record of the inner scorer."""
        return self.scorer.record()

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """Scores as the inner scorer does; it receives only the new texts.

        Raises:
            NoTextScoredError: Every text failed.
            DataError: The file was damaged since it was last read.
            DataFileError: The file cannot be read or written.
        """
        check_texts(texts)
        with self._locked("read"):
            self._read_new_rows()
        keys = {text: _digest(text) for text in dict.fromkeys(texts)}
        # Sorted by length, which keeps the inner scorer's batches even.
        new = sorted((text for text, key in keys.items() if key not in self._known), key=len)
        found, error = self._score_new(new)
        rows = {text: self._known.get(key) or found.get(text) for text, key in keys.items()}
        types = next((list(row) for row in rows.values() if row), None)
        if types is None:
            if error is not None:
                raise error
            return self.scorer.score_types(texts)
        failed = dict.fromkeys(types, math.nan)
        return {kind: [(rows[text] or failed)[kind] for text in texts] for kind in types}

    def _score_new(
        self, texts: Sequence[str]
    ) -> tuple[dict[str, dict[str, float]], NoTextScoredError | None]:
        """Scores and stores chunk by chunk; returns rows by text, and the last failure if any."""
        found: dict[str, dict[str, float]] = {}
        start, last_error = 0, None
        while start < len(texts):
            chunk = texts[start : start + self._chunk]
            start += len(chunk)
            began = time.monotonic()
            try:
                scores = self.scorer.score_types(chunk)
            except NoTextScoredError as error:  # other chunks may succeed
                last_error = error
                continue
            seconds = max(time.monotonic() - began, 1e-6)
            wanted = int(len(chunk) * _CHUNK_SECONDS / seconds)
            self._chunk = min(max(wanted, 1), 4 * self._chunk, _LARGEST_CHUNK)
            rows = {
                text: {kind: values[row] for kind, values in scores.items()}
                for row, text in enumerate(chunk)
            }
            found |= rows
            self._append(
                {
                    _digest(text): row
                    for text, row in rows.items()
                    if not any(map(math.isnan, row.values()))
                }
            )
        return found, last_error

    def _append(self, rows: Mapping[str, dict[str, float]]) -> None:
        if not rows:
            return
        with self._locked("write"):
            self._read_new_rows()
            with self._journal.open() as append:
                for key, scores in rows.items():
                    append({"scorer": self._identity, "text": key, "scores": scores})
        self._known |= rows

    def _read_new_rows(self) -> None:
        """Reads what this or another process has appended; the lock must be held."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._journal.size:  # the file was replaced
            self._journal.forget()
        try:
            for number, line in self._journal.read():
                scorer, text, scores = _parse(line, number)
                if scorer == self._identity:
                    self._known[text] = scores
        except DamagedLineError as error:
            self._journal.forget()
            raise DataError(
                f"line {error.number} of {self.path} is not a row of scores. Delete that line, "
                "delete the file to score all texts again, or name another file."
            ) from error
        # The lock is held, so no other process is about to complete a torn line.
        if self._journal.cut_torn_line():
            logger.warning("%s: the last line was torn by a kill, so it is removed", self.path)

    @contextlib.contextmanager
    def _locked(self, verb: str) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (OSError, NotImplementedError) as error:
            # filelock raises NotImplementedError if the file system does not support locks.
            reason = getattr(error, "strerror", None) or str(error)
            raise DataFileError(
                f"cannot {verb} the scores in {self.path}: {reason}; name another file"
            ) from error


def _parse(line: bytes, number: int) -> tuple[str, str, dict[str, float]]:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        row = json.loads(line)
        scorer, text = str(row["scorer"]), str(row["text"])
        scores = {str(kind): float(value) for kind, value in row["scores"].items()}
        if "toxicity" in scores and all(0.0 <= value <= 1.0 for value in scores.values()):
            return scorer, text, scores
    raise DamagedLineError(number)


def _digest(text: str) -> str:
    # surrogatepass: texts with lone surrogates need different digests, too.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
