"""JSON Lines of completions: appended row by row, resumed after an interruption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.differences import differences
from fusion_detox.files.journal import append_row

if TYPE_CHECKING:
    from fusion_detox.generation.sampling import Job, Row

_START = b'{"index": '


class CompletionWriter:
    """Writes rows to a stream, each at once, so that an interruption loses none.

    A row is ``{"index", "sample", "prompt", "completion", "tokens", "finish"}`` with ``"finish"``
    either ``"stop"`` or ``"length"``, ``"base"`` where the unfused completion was asked
    for, and the ``"settings"`` of the run.
    """

    def __init__(self, stream: BinaryIO, name: str, settings: Mapping[str, Any]) -> None:
        self._stream = stream
        self._name = name
        self._settings = dict(settings)
        self.written = 0

    def write(self, row: Row) -> None:
        """Appends one row.

        Raises:
            DataFileError: The device is full or broken; rows written before are kept.
        """
        try:
            append_row(self._stream, _record(row, self._settings))
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DataFileError(
                f"cannot write to {self._name}: {error.strerror}; {self.written} rows of this run "
                "are kept, and the same command goes on from there once that is mended"
            ) from error
        self.written += 1


class CompletionFile:
    """A file of rows that a later run with the same prompts and settings completes.

    Nothing is written before :meth:`open`.

    Args:
        path: The file; its folder must exist.
        settings: What decides the text of a completion; stored in each row and compared.
        overwrite: Start anew instead of completing what is there.

    Raises:
        DataError: The file holds something else, or rows of other settings.
        DataFileError: It cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        if path.is_dir():
            raise DataFileError(f"{path} is a folder; name a file for the output")
        if not path.parent.is_dir():
            raise DataFileError(f"the folder {path.parent} of the output does not exist; create it")
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._rows: dict[tuple[int, int], str] = {}
        self._size: int | None = 0 if overwrite else None
        # A device such as /dev/null can be written but not resumed.
        if path.is_file() and not overwrite:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataFileError(f"cannot read {path}: {error.strerror}") from error
            self._resume(content)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise DataFileError(f"no permission to write to {path}")

    @contextlib.contextmanager
    def open(self) -> Iterator[CompletionWriter]:
        """Opens the file for appending; a torn last line of an earlier run is cut off first."""
        try:
            if self._size is not None and self.path.is_file():
                os.truncate(self.path, self._size)
            # Unbuffered, so that a kill leaves whole rows and at most one torn line.
            stream = self.path.open("ab", buffering=0)
        except OSError as error:
            raise DataFileError(f"cannot write to {self.path}: {error.strerror}") from error
        with stream:
            yield CompletionWriter(stream, str(self.path), self._settings)

    def missing(self, wanted: Sequence[Job]) -> list[Job]:
        """The jobs that the file does not hold yet.

        Raises:
            DataError: The file holds a row of another prompt under the same index.
        """
        for job in wanted:
            before = self._rows.get((job.index, job.sample))
            if before is not None and before != job.prompt:
                raise DataError(
                    f"{self.path} was written for other prompts: prompt {job.index} was "
                    f"{_short(before)}, now it is {_short(job.prompt)}; choose another output "
                    "file, or --overwrite to start anew"
                )
        return [job for job in wanted if (job.index, job.sample) not in self._rows]

    def _resume(self, content: bytes) -> None:
        whole, _, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            self._read(number, line)
        if torn and not (torn.startswith(_START) or _START.startswith(torn)):
            self._refuse(content.count(b"\n") + 1)
        self._size = len(content) - len(torn)

    def _read(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            key, prompt, before = (row["index"], row["sample"]), row["prompt"], row["settings"]
            self._rows[key] = prompt
        except (ValueError, TypeError, KeyError):
            self._refuse(number)
        if before != self._settings:
            changed = "; ".join(
                f"{name} was {json.dumps(one)}, now {json.dumps(other)}"
                for name, one, other in differences(before, self._settings)
            )
            raise DataError(
                f"{self.path} was written with other settings ({changed}); choose another "
                "output file, or --overwrite to start anew"
            )

    def _refuse(self, number: int) -> None:
        raise DataError(
            f"line {number} of {self.path} is not a row of completions; choose another output "
            "file, or --overwrite to lose what it holds"
        )


def folder_fingerprint(
    folder: Path, *, samples: int = 64, size: int = 1 << 14, without: Collection[str] = ()
) -> str:
    """Tells whether a model folder holds what it held: 12 hex digits of SHA-256.

    Reads all of the configuration, but of large weights ``samples`` pieces of ``size`` bytes only:
    training moves all weights, so that the pieces tell two models apart. Nothing of the folders
    inside it that are named in ``without``.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".safetensors", ".json") or not path.is_file():
            continue
        if path.relative_to(folder).parts[0] in without:
            continue
        length = path.stat().st_size
        whole = path.suffix == ".json" or length <= samples * size
        digest.update(f"{path.relative_to(folder).as_posix()}:{length}:".encode())
        with path.open("rb") as file:
            for piece in range(1 if whole else samples):
                file.seek(piece * (length - size) // (samples - 1))
                digest.update(file.read(-1 if whole else size))
    return digest.hexdigest()[:12]


def _record(row: Row, settings: dict[str, Any]) -> dict[str, Any]:
    job, completion, base = row
    record = {
        "index": job.index,
        "sample": job.sample,
        "prompt": job.prompt,
        "completion": completion.text,
        "tokens": len(completion.token_ids),
        "finish": "stop" if completion.finished else "length",
    }
    if base is not None:
        record["base"] = base.text
    return {**record, "settings": settings}


def _short(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
