"""``tuning.json`` of a calibrator: how its settings were found, and on which prompts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusion_detox.errors import DataError, DataFileError

NAME = "tuning.json"


def prompt_digest(prompt: str) -> str:
    """10 hex digits that tell a prompt from others; case and white space do not count."""
    return hashlib.sha256(" ".join(prompt.lower().split()).encode("utf-8", "replace")).hexdigest()[
        :10
    ]


def prompts_in_common(one: Iterable[str], other: Iterable[str]) -> int:
    """How many of the digests of ``one`` occur in ``other``."""
    there = set(other)
    return sum(digest in there for digest in one)


def read_tuning(folder: Path) -> dict[str, Any] | None:
    """The record of a calibrator's folder; ``None`` where its settings were not tuned.

    Raises:
        DataError: It is damaged.
    """
    path = folder / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error}); delete it, or tune the calibrator again"
        ) from error
    if not isinstance(values, dict) or not isinstance(values.get("prompt_digests"), list):
        raise DataError(f"{path} is no record of a tuning; delete it, or tune the calibrator again")
    return values


def write_tuning(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes the record whole or not at all.

    Raises:
        DataFileError: The folder cannot be written.
    """
    path, temporary = folder / NAME, folder / f".{NAME}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataFileError(f"cannot write {path}: {error.strerror}") from error
