"""Every continuation of a run, appended to JSON Lines at once; nothing is lost or written twice.

Each process of a distributed run appends to a file of its own; reading joins them, so that a run
may be resumed with another number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.journal import append_row

if TYPE_CHECKING:
    from fusion_detox.generation.sampling import Job


@dataclasses.dataclass(frozen=True)
class Sample:
    """One continuation: which prompt, which of its samples, tokens, text, why it ended."""

    seed: int
    index: int
    sample: int
    ids: tuple[int, ...]
    text: str
    finish: str


class SampleFiles:
    """The continuations of one setting, in ``<stem>.<rank>.jsonl`` files of a folder.

    Args:
        folder: Where; it must exist.
        stem: Names the setting; whatever would change a continuation must change it.
        rank: This process's number.
    """

    def __init__(self, folder: Path, stem: str, rank: int = 0) -> None:
        self._folder, self._stem = folder, stem
        self._own = folder / f"{stem}.{rank}.jsonl"

    def read(self) -> dict[tuple[int, int, int], Sample]:
        """All whole rows of all processes by ``(seed, index, sample)``.

        Raises:
            DataError: A line, other than a torn last one, is not a row.
            DataFileError: A file cannot be read.
        """
        found: dict[tuple[int, int, int], Sample] = {}
        for path in sorted(self._folder.glob(f"{self._stem}.*.jsonl")):
            for number, line in enumerate(_whole_lines(path).split(b"\n")[:-1], start=1):
                row = _parse(line, number, path)
                found.setdefault((row.seed, row.index, row.sample), row)
        return found

    def missing(self, wanted: Sequence[Job], seeds: Sequence[int]) -> dict[int, list[Job]]:
        """The jobs of each seed that are not there yet, in their order."""
        found = self.read()
        return {
            seed: [job for job in wanted if (seed, job.index, job.sample) not in found]
            for seed in seeds
        }

    @contextlib.contextmanager
    def open(self) -> Iterator[SampleWriter]:
        """Opens this process's file for appending; a torn last line is cut off first."""
        try:
            if self._own.exists():
                os.truncate(self._own, len(_whole_lines(self._own)))
            stream = self._own.open("ab", buffering=0)
        except OSError as error:
            raise DataFileError(f"cannot write to {self._own}: {error.strerror}") from error
        with stream:
            yield SampleWriter(stream, self._own)


class SampleWriter:
    """Appends samples, each at once."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path

    def write(self, row: Sample) -> None:
        """Appends one row.

        Raises:
            DataFileError: The disk is full or broken; rows written before are kept.
        """
        try:
            append_row(self._stream, dataclasses.asdict(row), errors="surrogatepass")
        except OSError as error:
            raise DataFileError(
                f"cannot write to {self._path}: {error.strerror}; what was written before is kept, "
                "and the same command goes on from there once that is mended"
            ) from error


def _whole_lines(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror}") from error
    return content[: content.rfind(b"\n") + 1]


def _parse(line: bytes, number: int, path: Path) -> Sample:
    try:
        row: dict[str, Any] = json.loads(line)
        return Sample(
            int(row["seed"]),
            int(row["index"]),
            int(row["sample"]),
            tuple(map(int, row["ids"])),
            str(row["text"]),
            str(row["finish"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"line {number} of {path} is not a continuation of this run; delete that line, and the "
            "same command writes it again"
        ) from error
