"""Read training text from files, folders and hub data sets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.files.tables import (
    SUFFIXES,
    Row,
    data_suffix,
    hub_rows,
    is_hub_id,
    read_table,
    read_text,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to learn; if it has a prompt, only the text after the prompt is learned."""

    text: str
    prompt: str = ""
    domain: str = ""

    @property
    def key(self) -> str:
        """A hash of the content that is the same on every machine."""
        return hashlib.md5(f"{self.prompt}\x00{self.text}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the fields that hold text, prompts and completions.

    Attributes:
        text: Field of a plain text; each string of a list is a document.
        prompt: Field of a prompt, which is read but not learned; ``None`` for plain text.
        completion: Field of the completion; replaces ``text`` if there is a prompt.
        domain: Field that names the kind of text; both models then see each kind equally often.
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise ConfigError(
                f"a prompt column needs a completion column and vice versa, but prompt is "
                f"{self.prompt!r} and completion is {self.completion!r}; set both or neither"
            )


@dataclasses.dataclass(frozen=True)
class Condition:
    """Keeps the rows whose field has one of several values."""

    column: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse a condition such as ``"label=neutral,neither"``.

        Raises:
            ConfigError: There is no ``=``, or nothing on one side of it.
        """
        column, equals, values = text.partition("=")
        if not equals or not column.strip() or not values.strip():
            raise ConfigError(f"a condition must look like label=neutral,neither, but is {text!r}")
        return cls(column.strip(), tuple(v.strip().lower() for v in values.split(",")))

    def holds(self, row: dict[str, Any], where: str) -> bool:
        """Whether to keep a row; write ``true``, ``false`` and ``null`` as in JSON."""
        if self.column not in row:
            raise _no_column(self.column, row, where)
        value = row[self.column]
        shown = value if isinstance(value, str) else json.dumps(value)
        return shown.lower() in self.values


def _no_column(column: str, row: dict[str, Any], where: str) -> DataError:
    return DataError(
        f"{where} has no column {column!r}; its columns are {', '.join(map(str, row))}. Name one "
        "of these, or fix the row"
    )


def read_documents(
    sources: Sequence[str | Path], columns: Columns, conditions: Sequence[Condition] = ()
) -> list[Document]:
    """Read all documents of files, folders or hub data sets, in order.

    Args:
        sources: Files (``.txt`` with a blank line between documents, ``.jsonl``, ``.ndjson``,
            ``.json``, ``.csv``, ``.tsv``, each also followed by ``.gz``), folders of such files, or
            hub ids ``org/name`` or ``org/name:split``.
        columns: The fields that hold the text.
        conditions: A row counts only if all conditions hold.

    Raises:
        DataFileError: A file does not exist or cannot be read.
        DataError: A file is empty, malformed, not UTF-8 or lacks a column, or no row is usable.
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
                + "; choose another source, column or condition"
            )
        logger.info("%s: %d documents", source, len(documents) - before)
    return documents


def file_hashes(sources: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of each file, for the training record."""
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
            raise DataError(
                f"{where}: column {name!r} holds {value!r}, which is not text; fix the row"
            )
        if value and value.strip():
            yield Document(value, prompt, domain)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and data_suffix(p) in SUFFIXES)
    if not found:
        raise DataFileError(f"{path} holds no file that ends in {', '.join(SUFFIXES)} (or .gz)")
    return found


def read_rows(source: str | Path) -> Iterator[Row]:
    """Yield the rows of one source of :func:`read_documents`."""
    path = Path(source).expanduser()
    if path.exists():
        for file in _files(path):
            yield from _file_rows(file)
    elif is_hub_id(str(source)):
        yield from hub_rows(str(source), "train")
    else:
        raise DataFileError(
            f"{source} is neither a file, a folder nor a hub id such as org/name; check the "
            "spelling"
        )


def _file_rows(path: Path) -> Iterator[Row]:
    suffix = data_suffix(path)
    if suffix not in SUFFIXES:
        raise DataFileError(
            f"{path}: unknown kind of file {suffix!r}; use one of {', '.join(SUFFIXES)} (or .gz)"
        )
    if suffix == ".txt":
        paragraphs = re.split(r"\n\s*\n", read_text(path)[0])
        for number, paragraph in enumerate(paragraphs, start=1):
            yield Row({"text": paragraph.strip("\n")}, f"{path} document {number}")
        return
    table = read_table(path)
    if table.form == "object":
        raise DataError(f"{path} must hold a list of objects, not one object; put it in a list")
    yield from table.rows
