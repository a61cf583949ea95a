"""Rows of a file, whatever its form: JSON Lines, JSON, CSV, TSV or a text a line; each in ``.gz``.

What is wrong with a file is said with the number of its line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.tables import decode_text, hub_rows, without_gz

LINE = "line"
"""Field of the text in the rows of a file without fields."""
_JSON = (".json", ".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_GZIP = b"\x1f\x8b"
_LINE_END = re.compile(r"\r\n|\n|\r")


class Row(NamedTuple):
    """Named fields, and where they stand, for messages."""

    values: dict[str, Any]
    where: str


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        rows: At least one.
        sha256: The first 16 hex digits of the file's hash, as it lies on the disk.
        named: Whether its rows have named fields; else each holds a text under ``LINE``.
    """

    rows: list[Row]
    sha256: str
    named: bool


def read_content(path: Path, *, as_lines: bool | None = None) -> Content:
    """Reads a file of texts.

    Args:
        path: The file. Its form is known by its name (``.jsonl``, ``.ndjson``, ``.json``, ``.csv``,
            ``.tsv``), else by its first line: an object of JSON, or text.
        as_lines: Take each line as a text, or never do; by default the file decides.

    Raises:
        DataFileError: It is missing, a folder, or cannot be read.
        DataError: It is empty, not UTF-8, or broken; the message says in which line.
    """
    text, sha256 = _read(path)
    suffix = without_gz(path).suffix.lower()
    # The first row of a table without a file name of a table is not told from a sentence.
    table = _TABLES.get(suffix)
    if as_lines or (as_lines is None and not table and not _is_json(text, suffix)):
        rows = [Row({LINE: line}, where) for line, where in _lines(text, path)]
        return Content(rows, sha256, named=False)
    rows = list(_table_rows(text, path, table) if table else _json_rows(text, path))
    if not rows:
        raise DataError(f"{path} holds no rows, only the head of a table or an empty list")
    return Content(rows, sha256, named=True)


def read_hub(source: str) -> list[Row]:
    """All rows of a hub data set ``org/name`` or ``org/name:split`` (``train`` by default).

    Raises:
        MissingExtraError: ``datasets`` is not installed.
        DataFileError: There is none, or the hub cannot be reached.
    """
    return [Row(*found) for found in hub_rows(source, "evaluate")]


def text_field(row: Row, *names: str) -> str:
    """The text in the first of some fields that a row has; a dotted name reaches into objects.

    Returns:
        The text, empty where the field holds null.

    Raises:
        DataError: The row has none of the fields, or the field holds something else.
    """
    for name in names:
        value: Any = row.values
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            if value is not None and not isinstance(value, str):
                shown = json.dumps(value, default=str)[:60]
                raise DataError(f"{row.where}: field {name!r} holds no text but {shown}")
            return value or ""
    wanted = " or ".join(map(repr, names))
    raise DataError(f"{row.where} has no field {wanted}; it has: {', '.join(row.values)}")


def _read(path: Path) -> tuple[str, str]:
    if path.is_dir():
        raise DataFileError(f"{path} is a folder; give a file in it")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataFileError(f"there is no file {path}; check the spelling") from error
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror or error}") from error
    sha256 = hashlib.sha256(raw).hexdigest()[:16]
    if raw.startswith(_GZIP) or path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataFileError(
                f"{path} is no whole gzip file ({error}); copy or download it again"
            ) from error
    return decode_text(raw, path), sha256


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank. Other marks that ``splitlines`` knows may stand in a text."""
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if line.strip():
            yield line, f"{path} line {number}"


def _is_json(text: str, suffix: str) -> bool:
    if suffix in _JSON:
        return True
    first = text.lstrip().partition("\n")[0]
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _table_rows(text: str, path: Path, separator: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{where} has another number of fields than the header "
                    f"({', '.join(reader.fieldnames or ())}); quote fields that hold a separator"
                )
            yield Row(dict(row), where)
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} is not CSV: {error}") from error


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    if without_gz(path).suffix.lower() == ".json" or text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            # Many files of JSON Lines are named .json.
            if not error.msg.startswith("Extra data"):
                raise DataError(f"{path} line {error.lineno} is not JSON: {error.msg}") from error
        else:
            yield from _whole_rows(whole, path)
            return
    for line, where in _lines(text, path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg}: {line.strip()[:60]!r}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} must be an object with named fields: {line.strip()[:60]!r}")
        yield Row(row, where)


def _whole_rows(whole: Any, path: Path) -> Iterator[Row]:
    """Rows of a list of objects, of one object, or of BOLD's groups of names of prompts."""
    if isinstance(whole, dict) and whole and all(isinstance(v, dict) for v in whole.values()):
        for group, names in whole.items():
            for name, prompts in names.items():
                where = f"{path}, {group} > {name}"
                if not isinstance(prompts, list):
                    raise DataError(f"{where} must be a list of prompts, as in BOLD's files")
                for prompt in prompts:
                    yield Row({"prompt": prompt, "domain": path.stem, "group": group}, where)
        return
    rows = [whole] if isinstance(whole, dict) else whole
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must hold objects with named fields, a list or one a line")
    for index, row in enumerate(rows, start=1):
        yield Row(row, f"{path} item {index}")
