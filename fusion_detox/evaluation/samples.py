"""Every continuation of a run, in append-only JSON Lines.

Each process of a distributed run appends to its own file, and reading joins all files. A run may
therefore resume with a different number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.journal import DamagedLineError, Journal

if TYPE_CHECKING:
    from fusion_detox.generation.sampling import Job


@dataclasses.dataclass(frozen=True)
class Sample:
    """One continuation: seed, prompt index, sample number, token ids, text, and why it ended."""

    seed: int
    index: int
    sample: int
    ids: tuple[int, ...]
    text: str
    finish: str


Samples = dict[tuple[int, int, int], Sample]
"""Continuations by ``(seed, index, sample)``."""


class SampleFiles:
    """The continuations of one variant, in the ``<stem>.<rank>.jsonl`` files of a folder.

    Args:
        folder: An existing folder.
        stem: Names the variant; it must differ if anything that affects a continuation differs.
        rank: Number of this process.
    """

    def __init__(self, folder: Path, stem: str, rank: int = 0) -> None:
        self._folder, self._stem = folder, stem
        self._own = folder / f"{stem}.{rank}.jsonl"

    def read(self) -> Samples:
        """All complete rows of all processes; a torn last line is ignored."""
        found: Samples = {}
        for path in sorted(self._folder.glob(f"{self._stem}.*.jsonl")):
            for number, line in _lines(Journal(path, "seed")):
                row = _parse(line, number, path)
                found.setdefault((row.seed, row.index, row.sample), row)
        return found

    def missing(self, wanted: Sequence[Job], seeds: Sequence[int]) -> dict[int, list[Job]]:
        """The jobs of each seed that have no continuation yet, in order."""
        found = self.read()
        return {
            seed: [job for job in wanted if (seed, job.index, job.sample) not in found]
            for seed in seeds
        }

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[Sample], None]]:
        """Cuts off a torn last line of this process's file and yields a function that appends."""
        journal = Journal(self._own, "seed")
        _lines(journal)
        with contextlib.ExitStack() as stack:
            with self._explained():
                append = stack.enter_context(journal.open())

            def write(row: Sample) -> None:
                with self._explained():
                    append(dataclasses.asdict(row))

            yield write

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataFileError(
                f"cannot write to {self._own}: {error.strerror}; earlier rows are kept. Fix "
                "this, then run the same command again to resume"
            ) from error


def _lines(journal: Journal) -> list[tuple[int, bytes]]:
    try:
        return journal.read()
    except DamagedLineError as error:
        raise _damaged(error.number, journal.path) from error
    except OSError as error:
        raise DataFileError(f"cannot read {journal.path}: {error.strerror}") from error


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
        raise _damaged(number, path) from error


def _damaged(number: int, path: Path) -> DataError:
    return DataError(
        f"line {number} of {path} is not a continuation of this run; delete that line, then "
        "run the same command to write it again"
    )
