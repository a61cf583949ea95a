"""Append-only JSON Lines: a killed run loses at most the line it was writing, and can resume."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

# JSON allows these in strings, but many readers, str.splitlines among them, end a line there.
_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


class DamagedLineError(ValueError):
    """A line is not one of the journal's rows.

    Attributes:
        number: The number of the line, from 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"line {number} is not a row")
        self.number = number


class Journal:
    """A file of JSON Lines that is appended to row by row.

    Rows are written without a buffer, so a kill leaves complete rows and at most one torn line at
    the end, which :meth:`open` cuts off. Callers translate the errors, since only they know what a
    row means and what its loss would cost.

    Args:
        path: The file; it need not exist yet.
        first_key: The key that every row starts with. A torn last line that cannot be the start of
            such a row is somebody else's text and is never cut off.
    """

    def __init__(self, path: Path, first_key: str) -> None:
        self.path = path
        self._start = f"{{{json.dumps(first_key)}: ".encode()
        self.size = 0
        self.lines = 0

    def read(self) -> list[tuple[int, bytes]]:
        """The complete lines added since the last call, each with its number.

        Raises:
            DamagedLineError: The file ends in something that is not the start of a row.
            OSError: The file cannot be read. A missing file has no lines.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.size)
                content = file.read()
        except FileNotFoundError:
            return []
        whole, newline, torn = content.rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        if torn and not (torn.startswith(self._start) or self._start.startswith(torn)):
            raise DamagedLineError(self.lines + len(lines) + 1)
        numbered = list(enumerate(lines, start=self.lines + 1))
        self.size += len(whole) + len(newline)
        self.lines += len(lines)
        return numbered

    def forget(self) -> None:
        """Makes the next :meth:`read` start at the beginning of the file."""
        self.size = self.lines = 0

    def cut_torn_line(self) -> bool:
        """Cuts off what follows the lines that were read; whether there was anything.

        Raises:
            OSError: The file cannot be shortened.
        """
        if not self.path.is_file() or self.path.stat().st_size <= self.size:
            return False
        os.truncate(self.path, self.size)
        return True

    @contextlib.contextmanager
    def open(self, *, sync: bool = False) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Cuts off a torn last line and yields a function that appends a row.

        Args:
            sync: Wait for each row to reach the disk.

        Raises:
            OSError: The file cannot be written. The yielded function raises it too.
        """
        self.cut_torn_line()
        with self.path.open("ab", buffering=0) as stream:

            def append(row: Mapping[str, Any]) -> None:
                append_row(stream, row, errors="surrogatepass")
                if sync:
                    os.fsync(stream.fileno())

            yield append


def append_row(stream: BinaryIO, row: Mapping[str, Any], *, errors: str = "strict") -> None:
    """Writes one row and its line end.

    Args:
        stream: Opened without a buffer, so that the row is in the file at once.
        row: JSON-ready.
        errors: How lone surrogates are encoded, as for ``str.encode``.

    Raises:
        OSError: The device is full or broken.
    """
    line = json.dumps(row, ensure_ascii=False).translate(_BREAKS)
    rest = memoryview(line.encode("utf-8", errors) + b"\n")
    while rest:  # an unbuffered file may accept only a part
        rest = rest[stream.write(rest) :]
