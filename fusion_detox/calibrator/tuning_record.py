"""The ``tuning`` entry of a training record: how settings were chosen, and on which prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusion_detox.calibrator.folder import read_record, write_json
from fusion_detox.config import FusionConfig
from fusion_detox.errors import CalibratorError, ConfigError, DataFileError


def prompt_digest(prompt: str) -> str:
    """10 hex digits that identify a prompt, ignoring case and white space."""
    normalised = " ".join(prompt.lower().split()).encode("utf-8", "replace")
    return hashlib.sha256(normalised).hexdigest()[:10]


def prompts_in_common(one: Iterable[str], other: Iterable[str]) -> int:
    """How many of the digests in ``one`` also occur in ``other``."""
    others = set(other)
    return sum(digest in others for digest in one)


def tuned_prompts(record: Mapping[str, Any]) -> list[str]:
    """Digests of the prompts that a calibrator was tuned on; empty if it was never tuned."""
    tuning = record.get("tuning")
    found = tuning.get("prompt_digests") if isinstance(tuning, Mapping) else None
    return [str(digest) for digest in found] if isinstance(found, list) else []


def settings_before_tuning(record: Mapping[str, Any], present: FusionConfig) -> FusionConfig:
    """The settings that a tuned calibrator had before; ``present`` if it was not tuned since.

    A calibrator whose settings have been changed after tuning counts as not tuned.

    Raises:
        CalibratorError: The record is damaged.
    """
    tuning = record.get("tuning")
    before, chosen = (
        tuning.get(name) if isinstance(tuning, Mapping) else None for name in ("before", "chosen")
    )
    if not isinstance(before, Mapping) or not isinstance(chosen, Mapping):
        return present
    if any(chosen.get(name) != value for name, value in present.to_dict().items()):
        return present
    try:
        return FusionConfig.from_dict(dict(before))
    except ConfigError as error:
        raise CalibratorError(
            f"training.json: in tuning, before, {error}. Correct it in this file, or delete the "
            "entry 'tuning'."
        ) from error


def write_tuning(folder: Path, values: Mapping[str, Any]) -> None:
    """Store ``tuning`` in the training record of a saved calibrator, atomically.

    Raises:
        CalibratorError: The record is damaged.
        DataFileError: The folder cannot be written.
    """
    path = folder / "training.json"
    try:
        write_json(path, {**read_record(folder), "tuning": dict(values)})
    except OSError as error:
        raise DataFileError(
            f"{path} cannot be written: {error.strerror}. Its previous content is unchanged."
        ) from error
