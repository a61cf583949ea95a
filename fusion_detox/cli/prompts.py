"""Prompts from arguments, a text file, a JSON Lines file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_detox.errors import ConfigError, DataError, DataFileError

_JSON_LINES = (".jsonl", ".ndjson", ".json")


def read_prompts(
    arguments: Sequence[str], file: str | None = None, field: str | None = None
) -> list[str]:
    """The prompts that the user gave, in order.

    Args:
        arguments: Prompts given as arguments.
        file: A file, or ``"-"`` for standard input. JSON Lines where its name ends so or
            ``field`` is given, else a prompt a line; blank lines are skipped.
        field: Name of the field with the prompt, ``"prompt"`` by default; dots reach into
            objects (``prompt.text``).

    Raises:
        ConfigError: Both or neither of arguments and file, or a field without a file.
        DataError: No prompt, an empty prompt, bytes that are not UTF-8, a line that is not an
            object, or an object without the field.
        DataFileError: The file cannot be read.
    """
    if arguments and file is not None:
        raise ConfigError("give prompts as arguments or with --prompts-file, not both")
    if file is None:
        if field is not None:
            raise ConfigError("--prompt-field needs --prompts-file")
        if not arguments:
            raise ConfigError("no prompts: give some as arguments, or a file with --prompts-file")
        return list(arguments)
    name = "standard input" if file == "-" else file
    lines = _decode(_read(file), name).replace("\r\n", "\n").split("\n")
    if field is not None or Path(file).suffix.lower() in _JSON_LINES:
        prompts = [
            _field(line, field or "prompt", f"line {number} of {name}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{name} holds no prompts")
    return prompts


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    path = Path(file)
    if path.is_dir():
        raise DataFileError(f"{path} is a folder, not a file of prompts")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataFileError(f"there is no file of prompts at {path}") from error
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror}") from error


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"line {line} of {name} is not UTF-8 (byte {content[error.start]:#04x}); convert it, "
            f"for instance with: iconv -f latin1 -t utf-8 FILE"
        ) from error


def _field(line: str, field: str, place: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}") from error
    value = row
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            have = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise DataError(
                f"{place} has no field {field!r} (it has: {have}); name the field of the prompt "
                "with --prompt-field"
            )
        value = value[part]
    if not isinstance(value, str):
        raise DataError(f"{place}: field {field!r} holds no text but {json.dumps(value)[:60]}")
    if not value.strip():
        raise DataError(f"{place}: field {field!r} is empty; leave the row out")
    return value
