"""The ``tuning`` entry of a training record: how settings were chosen, and on which prompts."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.calibrator.folder import read_record, write_json
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, DataFileError

if TYPE_CHECKING:
    from fusion_detox.calibrator.calibrator import Calibrator


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


def settings_before_tuning(calibrator: Calibrator) -> FusionConfig:
    """The settings that a calibrator had before it was tuned, if it still has the tuned ones.

    A second run of ``tune`` starts there, so it finds what the first one found.
    """
    tuning = calibrator.record.get("tuning")
    if isinstance(tuning, Mapping) and tuning.get("after") == calibrator.config.to_dict():
        with contextlib.suppress(ConfigError, TypeError):
            return FusionConfig.from_dict(tuning["before"])
    return calibrator.config


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
