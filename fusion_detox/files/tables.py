"""What all readers of data share: names of files and hub data sets, their text, their rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusion_detox.errors import DataError, DataFileError, MissingExtraError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
"""``org/name`` or ``org/name:split``."""


def without_gz(path: Path) -> Path:
    """The file's name before it was compressed, whose suffix tells its form."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def decode_text(raw: bytes, path: Path) -> str:
    """The text of a file's bytes, without a byte order mark.

    Raises:
        DataError: It is blank or not UTF-8; the message says in which line.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        read = error.object  # without the byte order mark, unlike raw
        number = read.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {number}: byte 0x{read[error.start]:02x} is not UTF-8; convert the file "
            "first, for example with iconv"
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def hub_rows(source: str, extra: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a hub data set, each with where it stands, for messages.

    Args:
        source: ``org/name`` or ``org/name:split``, ``train`` by default.
        extra: The optional dependencies that hold ``datasets``, for the message.

    Raises:
        MissingExtraError: ``datasets`` is not installed.
        DataFileError: There is no such data set, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", extra) from error
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client raises many unrelated kinds
        raise DataFileError(
            f"no local file and no data set on the hub named {source!r}: {error}"
        ) from error
    for index, row in enumerate(rows):
        yield dict(row), f"{source} row {index}"
