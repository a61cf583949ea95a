"""The ``tuning`` entry of a training record: how settings were chosen, and on which prompts."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.calibrator.folder import read_record, write_config, write_json
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, DataFileError
from fusion_detox.files.atomic import link_entries, replacing_folder

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


def write_tuning(
    folder: Path, before: FusionConfig, after: FusionConfig, values: Mapping[str, Any]
) -> None:
    """Store tuned settings, how they were found, and a new card, all in one step.

    The folder is replaced as a whole by one with the same weights, as hard links.

    Args:
        folder: A saved calibrator.
        before: Its settings before tuning.
        after: The settings to recommend from now on.
        values: How they were found, JSON-ready.

    Raises:
        CalibratorError: The folder or its record is damaged.
        ConfigError: ``after`` needs a reference model and the calibrator has none.
        DataFileError: The folder cannot be written; it is unchanged.
    """
    folder = folder.resolve()
    tuning = {**values, "before": before.to_dict(), "after": after.to_dict()}
    try:
        with replacing_folder(folder) as new:
            link_entries(folder, new, lambda name: True)
            write_json(new / "training.json", {**read_record(folder), "tuning": tuning})
            write_config(new, after)
    except DataFileError:
        raise
    except OSError as error:
        raise DataFileError(
            f"{folder} cannot be written: {error.strerror}. Its previous content is unchanged."
        ) from error
