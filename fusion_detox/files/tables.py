"""Read texts and rows from JSON Lines, JSON, CSV, TSV and text files, and from hub data sets.

Any file may be compressed with gzip. Errors name the line.
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
from typing import Any, Literal, NamedTuple

from fusion_detox.errors import DataError, DataFileError, MissingExtraError
from fusion_detox.files.hub import hub_answers

LINE = "line"
"""Field that holds the text if the file has no named fields."""
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""Suffixes of the files that can be read; each may be followed by ``.gz``."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_JSON = (".json", ".jsonl", ".ndjson")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_GZIP = b"\x1f\x8b"
# Text shrinks to a third or a tenth, logs to a fiftieth, but a gzip bomb to a thousandth.
_MAX_EXPANSION, _ALWAYS_EXPANDED, _MAX_EXPANDED = 100, 1 << 26, 1 << 31
_MAX_LINE = 1 << 24
_EXTREME_JSON = "nests JSON too deeply, or has a number of thousands of digits; fix or remove it"
# str.splitlines also splits at other characters, which texts may contain.
_LINE_END = re.compile(r"\r\n|\n|\r")


class Row(NamedTuple):
    """Named fields and their place in the source, for messages."""

    values: dict[str, Any]
    where: str


class Table(NamedTuple):
    """Content of a file.

    Attributes:
        rows: At least one.
        sha256: First 16 hex digits of the hash of the file's bytes.
        form: ``"lines"`` if each row holds one line under ``LINE``, ``"object"`` if the whole file
            is one JSON object, otherwise ``"rows"``.
    """

    rows: list[Row]
    sha256: str
    form: Literal["lines", "object", "rows"]


def read_table(path: Path, *, as_lines: bool | None = None, raw: bytes | None = None) -> Table:
    """Read the rows of a file.

    Args:
        path: The file. Its suffix determines the format. For any other suffix, it is JSON Lines if
            the first line is a JSON object, and text otherwise.
        as_lines: Whether each line that is not blank is a text; by default, the format decides.
        raw: The content, if it has already been read; ``path`` then only names it.

    Raises:
        DataFileError: The file does not exist, is a folder or cannot be read.
        DataError: The file is empty, malformed or not UTF-8.
    """
    text, sha256 = read_text(path, raw)
    suffix = data_suffix(path)
    separator = _SEPARATORS.get(suffix)
    # Without a .csv or .tsv suffix, a header cannot be told from a sentence.
    if as_lines or (as_lines is None and not separator and not _is_json(text, suffix)):
        return Table(
            [Row({LINE: line}, where) for line, where in _lines(text, path)], sha256, "lines"
        )
    if separator:
        rows = list(_separated_rows(text, path, separator))
    elif suffix == ".json" or text.lstrip().startswith("["):
        rows, is_object = _json_rows(text, path)
        if is_object:
            return Table(rows, sha256, "object")
    else:
        rows = list(_json_lines(text, path))
    if not rows:
        raise DataError(f"{path} holds no rows: only a header or an empty list; add rows")
    return Table(rows, sha256, "rows")


def read_text(path: Path, raw: bytes | None = None) -> tuple[str, str]:
    """Read a file as UTF-8 text, without its byte order mark.

    Args:
        path: The file, decompressed if it is gzip.
        raw: The content, if it has already been read; ``path`` then only names it.

    Returns:
        The text, and the first 16 hex digits of the SHA-256 hash of the file's bytes.

    Raises:
        DataFileError: The file does not exist, is a folder or cannot be read.
        DataError: The text is blank or not UTF-8.
    """
    raw = _read_bytes(path) if raw is None else raw
    sha256 = hashlib.sha256(raw).hexdigest()[:16]
    if raw.startswith(_GZIP) or path.suffix == ".gz":
        raw = _decompressed(raw, path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        content = error.object  # without the byte order mark, unlike raw
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the "
            "file, for example with iconv -f latin1 -t utf-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty; add some text")
    return text, sha256


def data_suffix(path: Path) -> str:
    """The lower-case suffix that tells a file's format, without ``.gz``."""
    return without_gz(path).suffix.lower()


def without_gz(path: Path) -> Path:
    """The path without a final ``.gz``."""
    return path.with_suffix("") if path.suffix == ".gz" else path


def is_hub_id(source: str) -> bool:
    """Whether a source is ``org/name`` or ``org/name:split`` rather than a file or folder."""
    path = Path(source).expanduser()
    looks_like_file = path.suffix == ".gz" or data_suffix(path) in SUFFIXES
    return bool(_HUB_ID.fullmatch(source)) and not looks_like_file and not path.exists()


def hub_rows(source: str, extra: str) -> Iterator[Row]:
    """Yield the rows of a hub data set.

    Args:
        source: ``org/name`` or ``org/name:split``; the default split is ``train``.
        extra: The optional dependency group that contains ``datasets``, for the message.

    Raises:
        MissingExtraError: ``datasets`` is not installed.
        DataFileError: The data set does not exist, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", extra) from error
    name, _, split = source.partition(":")
    if not (datasets.config.HF_HUB_OFFLINE or hub_answers()):  # it would ask again and again
        raise DataFileError(
            f"found no local file named {source!r}, and the hub does not answer. Check the "
            "spelling and the network; HF_HUB_OFFLINE=1 uses a data set that was downloaded before"
        )
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client raises many unrelated kinds
        raise DataFileError(
            f"found no local file and no data set on the hub named {source!r}: {error}"
        ) from error
    for index, row in enumerate(rows):
        yield Row(dict(row), f"{source} row {index}")


def text_field(row: Row, *names: str) -> str:
    """The text in the first of several fields that the row has.

    Args:
        row: The row.
        names: Names of fields; dots reach into objects.

    Returns:
        The text; empty if the field is null.

    Raises:
        DataError: The row has none of the fields, or the field does not hold text.
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
                raise DataError(
                    f"{row.where}: field {name!r} must hold text, but holds {shown}; name another "
                    "field, or fix the row"
                )
            return value or ""
    wanted = " or ".join(map(repr, names))
    raise DataError(
        f"{row.where} has no field {wanted}; it has: {', '.join(map(str, row.values))}. Name one "
        "of these, or fix the row"
    )


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataFileError(f"{path} is a folder; give a file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataFileError(f"there is no file {path}; check the spelling") from error
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror or error}") from error


def _decompressed(raw: bytes, path: Path) -> bytes:
    limit = min(max(_ALWAYS_EXPANDED, _MAX_EXPANSION * len(raw)), _MAX_EXPANDED)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            content = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(
            f"{path} cannot be read: it is not a complete gzip file ({error}); copy or "
            "download it again"
        ) from error
    if len(content) > limit:
        raise DataFileError(
            f"{path} has {len(raw):,} bytes and expands to more than {limit:,}, so it may be meant "
            "to fill the memory. If you trust it, decompress it with gunzip and give that file"
        )
    return content


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if len(line) > _MAX_LINE:
            raise DataError(
                f"{path} line {number} has {len(line):,} characters, but at most {_MAX_LINE:,} "
                "are read: break the line, or remove it"
            )
        if line.strip():
            yield line, f"{path} line {number}"


def _is_json(text: str, suffix: str) -> bool:
    if suffix in _JSON:
        return True
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _separated_rows(text: str, path: Path, separator: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_LINE)  # the default, 128 KiB, is less than a long document
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{where} has more or fewer fields than the header "
                    f"({', '.join(reader.fieldnames or ())}); quote fields that contain a separator"
                )
            yield Row(dict(row), where)
    except csv.Error as error:
        raise DataError(
            f"{path} line {reader.line_num} is not CSV: {error}; quote fields that contain quotes, "
            "and double the quotes in them"
        ) from error


def _json_rows(text: str, path: Path) -> tuple[list[Row], bool]:
    """The rows of a JSON list or object, and whether it is an object."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):  # many files of JSON Lines are named .json
            return list(_json_lines(text, path)), False
        raise DataError(
            f"{path} line {error.lineno} is not JSON: {error.msg}; fix the line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} {_EXTREME_JSON}") from error
    items = whole if isinstance(whole, list) else [whole]
    rows = [_row(item, f"{path} item {number}") for number, item in enumerate(items, start=1)]
    return rows, isinstance(whole, dict)


def _json_lines(text: str, path: Path) -> Iterator[Row]:
    for line, where in _lines(text, path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            shown = line.strip()[:60]
            raise DataError(f"{where} is not JSON: {error.msg}: {shown!r}; fix the line") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} {_EXTREME_JSON}") from error
        yield _row(row, where)


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        shown = json.dumps(value)[:60]
        raise DataError(f"{where} must be an object with named fields, not {shown}; fix it")
    return Row(value, where)
