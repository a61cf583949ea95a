"""How a calibrator's settings were found, and on which prompts: ``tuning`` in its record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusion_detox.calibrator.reading import read_record
from fusion_detox.errors import DataFileError
from fusion_detox.files.atomic import write_whole


def prompt_digest(prompt: str) -> str:
    """10 hex digits that tell a prompt from others; case and white space do not count."""
    plain = " ".join(prompt.lower().split()).encode("utf-8", "replace")
    return hashlib.sha256(plain).hexdigest()[:10]


def prompts_in_common(one: Iterable[str], other: Iterable[str]) -> int:
    """How many of the digests of ``one`` occur in ``other``."""
    there = set(other)
    return sum(digest in there for digest in one)


def tuned_prompts(record: Mapping[str, Any]) -> list[str]:
    """Digests of the prompts that the settings of a calibrator were chosen on; none if untuned."""
    tuning = record.get("tuning")
    found = tuning.get("prompt_digests") if isinstance(tuning, Mapping) else None
    return [str(digest) for digest in found] if isinstance(found, list) else []


def write_tuning(folder: Path, values: Mapping[str, Any]) -> None:
    """Puts ``tuning`` into the record of a saved calibrator, whole or not at all.

    Raises:
        CalibratorError: The record is damaged.
        DataFileError: The folder cannot be written.
    """
    record = {**read_record(folder), "tuning": dict(values)}
    path = folder / "training.json"
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_whole(path, text.encode("utf-8"))
    except OSError as error:
        raise DataFileError(
            f"cannot write {path}: {error.strerror}; what was there before is kept"
        ) from error
