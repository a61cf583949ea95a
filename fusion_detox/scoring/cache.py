"""Scores on disk, so that no text is scored twice by the same scorer."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.scoring.base import NoTextScoredError, Scorer, check_texts

logger = logging.getLogger(__name__)

# A chunk of texts takes about this long to score, and so much a kill costs.
_CHUNK_SECONDS = 5.0
_FIRST_CHUNK, _LARGEST_CHUNK = 8, 4096


class CachedScorer(Scorer):
    """A scorer that looks up what it has scored before.

    The file is JSON Lines, ``{"scorer", "text", "scores"}``: a hash of the scorer's record, SHA-256
    of the text, and the score of each type. So a file may serve several scorers, and one whose
    record changes starts anew. Rows are appended after every few seconds of scoring; a kill loses
    no more, and a line that it tore is cut off. Several processes may share a file, and each
    sees what the others have written. Scores of nan are not kept, so that a failed text is tried
    again.

    Args:
        scorer: Scores what is not in the file.
        path: The file; its folder must exist.

    Raises:
        DataError: The file holds something else.
        DataFileError: It cannot be read or written.
    """

    def __init__(self, scorer: Scorer, path: str | os.PathLike[str]) -> None:
        self.scorer, self.name, self.path = scorer, scorer.name, Path(path)
        if not self.path.parent.is_dir():
            raise DataFileError(
                f"the folder {self.path.parent} of the scores does not exist; create it"
            )
        self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        self._identity = _digest(json.dumps(scorer.record(), sort_keys=True))[:16]
        self._known: dict[str, dict[str, float]] = {}
        self._read_to = self._lines = 0
        self._chunk = _FIRST_CHUNK
        self._refresh()

    def record(self) -> dict[str, Any]:
        """That of the scorer within."""
        return self.scorer.record()

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """As the scorer within, which is asked for new texts only.

        Raises:
            NoTextScoredError: Every text failed.
            DataError: The file was damaged meanwhile.
            DataFileError: It cannot be read or written.
        """
        check_texts(texts)
        self._refresh()
        keys = {text: _digest(text) for text in dict.fromkeys(texts)}
        new = [text for text, key in keys.items() if key not in self._known]
        # From short to long, so that the batches of the scorer within stay even.
        new.sort(key=len)
        found: dict[str, dict[str, float]] = {}
        error = self._score(new, found)
        rows = {text: self._known.get(key) or found.get(text) for text, key in keys.items()}
        types = next((list(row) for row in rows.values() if row), None)
        if types is None:
            if error is not None:
                raise error
            return self.scorer.score_types(texts)
        failed = dict.fromkeys(types, math.nan)
        return {kind: [(rows[text] or failed)[kind] for text in texts] for kind in types}

    def _score(
        self, texts: Sequence[str], found: dict[str, dict[str, float]]
    ) -> NoTextScoredError | None:
        """Scores and keeps chunk after chunk; the last error of a chunk that failed as a whole."""
        start, last_error = 0, None
        while start < len(texts):
            chunk = texts[start : start + self._chunk]
            start += len(chunk)
            began = time.monotonic()
            try:
                scores = self.scorer.score_types(chunk)
            except NoTextScoredError as error:  # other chunks may do better
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
        return last_error

    def _append(self, rows: Mapping[str, dict[str, float]]) -> None:
        lines = "".join(
            json.dumps({"scorer": self._identity, "text": key, "scores": row}) + "\n"
            for key, row in rows.items()
        )
        if not lines:
            return
        try:
            with self._lock:
                self._read_new()
                with self.path.open("ab") as file:
                    file.write(lines.encode("ascii"))
                self._read_to += len(lines)
                self._lines += len(rows)
        except (OSError, NotImplementedError) as error:
            raise _file_error("write", self.path, error) from error
        self._known |= rows

    def _refresh(self) -> None:
        """Reads what this or another process has appended since."""
        try:
            with self._lock:
                self._read_new()
        except (OSError, NotImplementedError) as error:
            raise _file_error("read", self.path, error) from error

    def _read_new(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._read_to:  # it was replaced
            self._read_to = self._lines = 0
        if size == self._read_to:
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            content = file.read()
        whole, newline, torn = content.rpartition(b"\n")
        rows = [self._row(n, line) for n, line in enumerate(whole.split(b"\n") if newline else [])]
        if torn:
            # Nobody else writes while the lock is held, so the rest of the line will not come.
            if not _begins_row(torn):
                self._refuse(self._lines + len(rows))
            logger.warning("%s: the last line is not whole and is cut off", self.path)
            os.truncate(self.path, self._read_to + len(whole) + len(newline))
        self._known |= {text: scores for scorer, text, scores in rows if scorer == self._identity}
        self._read_to += len(whole) + len(newline)
        self._lines += len(rows)

    def _row(self, index: int, line: bytes) -> tuple[str, str, dict[str, float]]:
        try:
            row = json.loads(line)
            scorer, text, scores = str(row["scorer"]), str(row["text"]), row["scores"]
            scores = {str(kind): float(value) for kind, value in scores.items()}
            if "toxicity" in scores and all(0.0 <= value <= 1.0 for value in scores.values()):
                return scorer, text, scores
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        self._refuse(self._lines + index)

    def _refuse(self, index: int) -> NoReturn:
        raise DataError(
            f"line {index + 1} of {self.path} is no row of scores. Delete that line, or the file "
            "to have all texts scored anew, or name another file."
        )


def _digest(text: str) -> str:
    # Lone surrogates, too, are texts to tell apart.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _begins_row(torn: bytes) -> bool:
    start = b'{"scorer": "'
    return torn.startswith(start) or start.startswith(torn)


def _file_error(verb: str, path: Path, error: Exception) -> DataFileError:
    # filelock raises NotImplementedError where the file system has no locks.
    reason = getattr(error, "strerror", None) or str(error)
    return DataFileError(f"cannot {verb} the scores in {path}: {reason}; name another file")
