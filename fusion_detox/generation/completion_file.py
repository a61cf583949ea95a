"""A JSON Lines file of completions, from which an interrupted run resumes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.differences import differences
from fusion_detox.files.journal import DamagedLineError, Journal
from fusion_detox.files.locks import claimed

if TYPE_CHECKING:
    from fusion_detox.generation.sampling import Job, Row


class CompletionWriter:
    """Writes rows of completions and counts them.

    A row is ``{"index", "sample", "prompt", "completion", "tokens", "finish", "settings"}``, where
    ``"finish"`` is ``"stop"`` or ``"length"``. It also has ``"base"`` if the completion without
    fusion was requested.

    Args:
        append: Writes a JSON-ready row.
        name: Name of the output, for messages.
        settings: Settings of the run, stored in each row.
    """

    def __init__(
        self, append: Callable[[Mapping[str, Any]], None], name: str, settings: Mapping[str, Any]
    ) -> None:
        self._append = append
        self._name = name
        self._settings = dict(settings)
        self.written = 0

    def write(self, row: Row) -> None:
        """Append one row.

        Raises:
            DataFileError: The disk is full or broken; earlier rows are kept.
        """
        try:
            self._append(_record(row, self._settings))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DataFileError(
                f"cannot write to {self._name}: {error.strerror}; {self.written} rows of this run "
                "are kept. Fix this, then rerun the command to resume"
            ) from error
        self.written += 1


@contextlib.contextmanager
def claimed_file(path: Path | None) -> Iterator[None]:
    """Be the only process that writes an output; devices and pipes are not claimed.

    Raises:
        DataFileError: Another process is writing it.
    """
    regular = path is not None and (path.is_file() or not path.exists()) and path.parent.is_dir()
    with claimed(path) if path is not None and regular else contextlib.nullcontext():
        yield


class CompletionFile:
    """A file of completions. A later run with the same prompts and settings resumes it.

    Nothing is written before :meth:`open`.

    Args:
        path: The file; its folder must exist.
        settings: Everything that determines a completion. Stored in each row; must not change.
        overwrite: Replace the file instead of resuming it.

    Raises:
        DataError: The file holds something else, or rows from a run with other settings.
        DataFileError: The file cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        if path.is_dir():
            raise DataFileError(f"{path} is a folder; name a file for the output")
        if not path.parent.is_dir():
            raise DataFileError(f"the output folder {path.parent} does not exist; create it")
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._rows: dict[tuple[int, int], str] = {}
        self._journal = Journal(path, "index")
        # A device such as /dev/null can be written to but not resumed.
        if path.is_file() and not overwrite:
            self._resume()
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise DataFileError(f"no permission to write to {path}; choose another output file")

    @contextlib.contextmanager
    def open(self) -> Iterator[CompletionWriter]:
        """Open the file for appending, after cutting off a torn last line.

        Raises:
            DataFileError: The file cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                append = stack.enter_context(self._journal.open())
            except OSError as error:
                raise DataFileError(
                    f"cannot write to {self.path}: {error.strerror}; choose another output file"
                ) from error
            yield CompletionWriter(append, str(self.path), self._settings)

    def missing(self, wanted: Sequence[Job]) -> list[Job]:
        """Return the jobs whose completions the file does not hold yet.

        Raises:
            DataError: The file holds a row for another prompt with the same index.
        """
        for job in wanted:
            before = self._rows.get((job.index, job.sample))
            if before is not None and before != job.prompt:
                raise DataError(
                    f"{self.path} was written for other prompts: prompt {job.index} was "
                    f"{_short(before)}, now it is {_short(job.prompt)}; choose another output "
                    "file, or use --overwrite to replace this one"
                )
        return [job for job in wanted if (job.index, job.sample) not in self._rows]

    def _resume(self) -> None:
        try:
            for number, line in self._journal.read():
                self._read_row(number, line)
        except OSError as error:
            raise DataFileError(
                f"cannot read {self.path}: {error.strerror}; choose another output file"
            ) from error
        except DamagedLineError as error:
            raise DataError(
                f"line {error.number} of {self.path} is not a row of completions; choose another "
                "output file, or use --overwrite to discard its content"
            ) from error

    def _read_row(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            key, prompt, before = (row["index"], row["sample"]), row["prompt"], row["settings"]
            self._rows[key] = prompt
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedLineError(number) from error
        if before != self._settings:
            changed = "; ".join(
                f"{name} was {json.dumps(one)}, now {json.dumps(other)}"
                for name, one, other in differences(before, self._settings)
            )
            raise DataError(
                f"{self.path} was written with other settings ({changed}); choose another "
                "output file, or use --overwrite to replace this one"
            )


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
