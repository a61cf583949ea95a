"""Prompts of the ``generate`` command: from arguments, a file or standard input."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from fusion_detox.errors import ConfigError, DataError
from fusion_detox.files.tables import LINE, data_suffix, read_table, text_field

_JSON = (".jsonl", ".ndjson", ".json")


def read_prompts(
    arguments: Sequence[str], file: str | None = None, field: str | None = None
) -> list[str]:
    """Return the prompts that the user gave, in order.

    Args:
        arguments: Prompts given as arguments.
        file: A file, or ``"-"`` for standard input, which is also read if there are no arguments
            and something is piped in. It holds rows with named fields if ``field`` is
            given or the suffix is JSON's; otherwise one prompt per line. Blank lines are skipped.
        field: Field that holds the prompt, ``"prompt"`` by default; dots reach into objects
            (``prompt.text``).

    Raises:
        ConfigError: Both or neither of arguments and file were given, or ``field`` without a file.
        DataError: The file holds no prompt, an empty prompt, malformed rows or bytes that are not
            UTF-8, or a row lacks the field.
        DataFileError: The file cannot be read.
    """
    if arguments and file is not None:
        raise ConfigError("give prompts either as arguments or with --prompts-file, not both")
    if file is None and not arguments and _is_piped():
        file = "-"
    if file is None:
        if field is not None:
            raise ConfigError("--prompt-field requires --prompts-file; add it, or drop the field")
        if not arguments:
            raise ConfigError(
                "no prompts: give some as arguments, a file with --prompts-file, or pipe them in"
            )
        return list(arguments)
    stdin = file == "-"
    path = Path("standard input" if stdin else file)
    as_lines = field is None and data_suffix(path) not in _JSON
    table = read_table(path, as_lines=as_lines, raw=sys.stdin.buffer.read() if stdin else None)
    name = LINE if as_lines else field or "prompt"
    prompts = []
    for row in table.rows:
        prompt = text_field(row, name)
        if not prompt.strip():
            raise DataError(f"{row.where}: field {name!r} is empty; remove the row")
        prompts.append(prompt)
    return prompts


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file, rather than a terminal or the null device."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, replaced or missing
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
