"""Append-only JSON Lines: a killed run loses at most the line being written, and can resume."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fusion_detox.files.printable import printable_json


class DamagedLineError(ValueError):
    """A line is not a row of the journal.

    Attributes:
        number: Number of the line, from 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"line {number} is not a row")
        self.number = number


class Journal:
    """A JSON Lines file to which rows are appended.

    Rows are written without a buffer, so a killed run leaves complete rows and at most one torn
    last line, which :meth:`open` cuts off. Callers translate the errors, since only they know what
    a row means.

    Args:
        path: The file; it need not exist yet.
        first_key: The first key of every row. A torn last line that does not start with this key is
            foreign text and is never cut off.
    """

    def __init__(self, path: Path, first_key: str) -> None:
        self.path = path
        self._start = f"{{{json.dumps(first_key)}: ".encode()
        self.size = 0
        self.lines = 0

    def read(self) -> list[tuple[int, bytes]]:
        """Return the complete lines added since the last call, each with its number.

        A missing file has no lines.

        Raises:
            DamagedLineError: The last line is torn and is not the start of a row.
            OSError: The file cannot be read.
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
        """Make the next :meth:`read` start at the beginning of the file."""
        self.size = self.lines = 0

    def cut_torn_line(self) -> bool:
        """Cut off everything after the lines that were read.

        Returns:
            Whether anything was cut off.

        Raises:
            OSError: The file cannot be truncated.
        """
        if not self.path.is_file() or self.path.stat().st_size <= self.size:
            return False
        os.truncate(self.path, self.size)
        return True

    @contextlib.contextmanager
    def open(self, *, sync: bool = False) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Cut off a torn last line and yield a function that appends a row.

        Args:
            sync: Wait until each row is on the disk.

        Raises:
            OSError: The file cannot be written; the yielded function may raise this as well.
        """
        self.cut_torn_line()
        with self.path.open("ab", buffering=0) as stream:

            def append(row: Mapping[str, Any]) -> None:
                append_row(stream, row, errors="surrogatepass")
                if sync:
                    os.fsync(stream.fileno())

            yield append


def append_row(stream: BinaryIO, row: Mapping[str, Any], *, errors: str = "strict") -> None:
    """Write a row as one line, and flush it.

    Args:
        stream: Where to write.
        row: JSON-ready values.
        errors: How to encode lone surrogates, as for ``str.encode``.

    Raises:
        OSError: The device is full or broken.
    """
    line = printable_json(row)
    rest = memoryview(line.encode("utf-8", errors) + b"\n")
    while rest:  # an unbuffered file may accept only a part
        rest = rest[stream.write(rest) :]
    stream.flush()
