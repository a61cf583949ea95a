"""JSON Lines that are appended row by row, so that a kill leaves at most one torn line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

# JSON allows them in strings, but many readers, str.splitlines among them, end a line there.
_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


def append_row(stream: BinaryIO, row: Mapping[str, Any], *, errors: str = "strict") -> None:
    """Writes one row and its line end.

    Args:
        stream: Opened without a buffer, so that the row is in the file at once.
        row: JSON-ready.
        errors: What becomes of lone surrogates, as for ``str.encode``.

    Raises:
        OSError: The device is full or broken.
    """
    line = json.dumps(row, ensure_ascii=False).translate(_BREAKS)
    rest = memoryview(line.encode("utf-8", errors) + b"\n")
    while rest:  # an unbuffered file may take a part only
        rest = rest[stream.write(rest) :]
