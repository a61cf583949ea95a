"""Reading training text: files or hub data sets in, documents out."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.files.tables import HUB_ID, decode_text, hub_rows, without_gz

logger = logging.getLogger(__name__)
_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. Where it has a prompt, only what follows the prompt is learned."""

    text: str
    prompt: str = ""
    domain: str = ""

    @property
    def key(self) -> str:
        """A hash of the content, the same on every machine."""
        return hashlib.md5(f"{self.prompt}\x00{self.text}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which fields of a row hold what.

    Attributes:
        text: Field of a plain text; a list of strings gives a document each.
        prompt: Field of a prompt, which is read but not learned; ``None`` for plain text.
        completion: Field of the completion, used in place of ``text`` beside a prompt.
        domain: Field that names a row's kind of text; both models then see every kind equally
            often.
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise ConfigError(
                "a prompt column needs a completion column and the other way round: "
                f"prompt is {self.prompt!r}, completion is {self.completion!r}"
            )


@dataclasses.dataclass(frozen=True)
class Condition:
    """Keeps the rows whose field has one of some values."""

    column: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Reads ``"label=neutral,neither"``.

        Raises:
            ConfigError: It has no ``=`` or nothing on one side.
        """
        column, equals, values = text.partition("=")
        if not equals or not column.strip() or not values.strip():
            raise ConfigError(f"a condition looks like label=neutral,neither, not {text!r}")
        return cls(column.strip(), tuple(v.strip().lower() for v in values.split(",")))

    def holds(self, row: dict[str, Any], where: str) -> bool:
        """Whether the row is kept; ``true``, ``false`` and ``null`` are written as in JSON."""
        if self.column not in row:
            raise _no_column(self.column, row, where)
        value = row[self.column]
        shown = value if isinstance(value, str) else json.dumps(value)
        return shown.lower() in self.values


def _no_column(column: str, row: dict[str, Any], where: str) -> DataError:
    return DataError(
        f"{where} has no column {column!r}; its columns are {', '.join(map(str, row))}"
    )


def read_documents(
    sources: Sequence[str | Path], columns: Columns, conditions: Sequence[Condition] = ()
) -> list[Document]:
    """Reads all documents of some files, folders or hub data sets, in order.

    Args:
        sources: Paths (``.txt`` with a blank line between documents, ``.jsonl``, ``.json``,
            ``.csv``, ``.tsv``, each also as ``.gz``; folders of them), or hub ids
            ``org/name`` or ``org/name:split``.
        columns: Where the rows hold their text.
        conditions: All must hold for a row to count.

    Raises:
        DataFileError: A file is not there or cannot be read.
        DataError: A file is empty, broken, not UTF-8 or lacks a column, or no row is usable.
    """
    documents: list[Document] = []
    for source in sources:
        before, seen = len(documents), 0
        for row, where in read_rows(source):
            seen += 1
            if all(condition.holds(row, where) for condition in conditions):
                documents += _documents(row, columns, where)
        if len(documents) == before:
            asked = "; ".join(f"{c.column}={','.join(c.values)}" for c in conditions)
            raise DataError(
                f"{source}: none of its {seen} rows is usable"
                + (f" under the condition {asked}" if asked else ": all texts are empty")
            )
        logger.info("%s: %d documents", source, len(documents) - before)
    return documents


def file_hashes(sources: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of each source, for the training record."""
    found: list[dict[str, Any]] = []
    for source in sources:
        paths = _files(Path(source)) if Path(source).exists() else []
        if not paths:
            found.append({"name": str(source), "kind": "hub"})
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb") as data:
                while block := data.read(1 << 20):
                    digest.update(block)
            size = path.stat().st_size
            found.append({"name": path.name, "bytes": size, "sha256": digest.hexdigest()})
    return found


def _documents(row: dict[str, Any], columns: Columns, where: str) -> Iterator[Document]:
    name = columns.completion or columns.text
    for needed in (name, columns.prompt, columns.domain):
        if needed is not None and needed not in row:
            raise _no_column(needed, row, where)
    values = row[name] if isinstance(row[name], list) else [row[name]]
    prompt = "" if columns.prompt is None else str(row[columns.prompt] or "")
    domain = "" if columns.domain is None else str(row[columns.domain])
    for value in values:
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: column {name!r} holds {value!r}, which is not text")
        if value and value.strip():
            yield Document(value, prompt, domain)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in _SUFFIXES)
    if not inside:
        raise DataFileError(f"{path} holds no file that ends in {', '.join(_SUFFIXES)} (or .gz)")
    return inside


def _suffix(path: Path) -> str:
    return without_gz(path).suffix.lower()


def read_rows(source: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of one source of ``read_documents``, each with its place for messages."""
    path = Path(source).expanduser()
    if path.exists():
        for file in _files(path):
            yield from _file_rows(file)
    elif HUB_ID.fullmatch(str(source)) and _suffix(path) not in _SUFFIXES:
        yield from hub_rows(str(source), "train")
    else:
        raise DataFileError(f"{source} is neither a file, a folder nor a hub id such as org/name")


def _file_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    suffix = _suffix(path)
    if suffix not in _SUFFIXES:
        raise DataFileError(
            f"{path}: unknown kind of file {suffix!r}; known are {', '.join(_SUFFIXES)} (or .gz)"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(f"{path} cannot be read: {error}") from error
    text = decode_text(raw, path)
    if suffix == ".txt":
        for index, part in enumerate(re.split(r"\n\s*\n", text), start=1):
            yield {"text": part.strip("\n")}, f"{path} document {index}"
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(path, text, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".jsonl":
        for number, line in enumerate(io.StringIO(text), start=1):
            where = f"{path} line {number}"
            if line.strip():
                yield _object(line, where), where
    else:
        yield from _json_rows(path, text)


def _table_rows(path: Path, text: str, separator: str) -> Iterator[tuple[dict[str, Any], str]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    for row in reader:
        where = f"{path} line {reader.line_num}"
        if None in row or None in row.values():
            raise DataError(f"{where} has another number of fields than the header")
        yield dict(row), where


def _json_rows(path: Path, text: str) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno} is not JSON: {error.msg}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must hold a list of objects; for an object a line use .jsonl")
    for index, row in enumerate(rows):
        yield row, f"{path} item {index + 1}"


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}: {line[:60].strip()!r}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object with named fields, not {line[:60].strip()!r}")
    return row
