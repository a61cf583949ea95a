"""The errors that the library raises. Each is also a ``ValueError`` or an ``OSError``."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


class FusionDetoxError(Exception):
    """Base class of the library's errors."""


class ConfigError(FusionDetoxError, ValueError):
    """An option is out of range, or two options contradict each other."""


class CalibratorError(FusionDetoxError, ValueError):
    """A calibrator folder is incomplete, damaged or inconsistent."""


class CalibratorNotFoundError(FusionDetoxError, OSError):
    """No calibrator was found under that path, shipped name or hub id."""


class ModelError(FusionDetoxError, ValueError):
    """A model cannot be used as target, base or calibrator."""


class ModelNotFoundError(FusionDetoxError, OSError):
    """No model or tokenizer was found under that path or hub id."""


class VocabularyError(FusionDetoxError, ValueError):
    """Two vocabularies cannot be mapped, or a tokenizer does not belong to a model."""


class InertError(FusionDetoxError, ValueError):
    """A processor would not change the target's text as its calibrator should."""


class AlignmentError(FusionDetoxError, ValueError):
    """A calibrator's hidden states cannot be projected to a target, or an alignment is damaged."""


class DataError(FusionDetoxError, ValueError):
    """Training data or prompts are unusable."""


class DataFileError(FusionDetoxError, OSError):
    """A data file is missing or cannot be read or written."""


class TrainingError(FusionDetoxError, ValueError):
    """Training cannot start or resume with these settings."""


class EndpointError(FusionDetoxError, OSError):
    """A text generation service rejects every request or does not respond."""


class MissingExtraError(FusionDetoxError, ImportError, ValueError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"The package {package!r} is required but not installed. "
            f"Install it with: {install_command(package, extra)}"
        )


def install_command(package: str, extra: str) -> str:
    """The command that installs an optional dependency group where the library came from.

    Args:
        package: The package that is missing.
        extra: The group that contains it.

    Returns:
        For a clone, a command that installs the clone with the group. Otherwise, since no index has
        the library, one that installs the packages of the group by name.
    """
    clone = Path(__file__).resolve().parents[1]
    project = clone / "pyproject.toml"
    if project.is_file() and 'name = "fusion-detox"' in project.read_text(encoding="utf-8"):
        return f'pip install -e "{clone}[{extra}]"'
    quoted = (f'"{one}"' for one in _requirements(extra) or [package])
    return f"pip install {' '.join(quoted)}"


def _requirements(extra: str) -> list[str]:
    """What the metadata of the installed library lists for a group, groups within it included."""
    try:
        lines = importlib.metadata.requires("fusion-detox") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[str] = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if marker.replace("'", '"') != f'extra == "{extra}"':
            continue
        own, bracket, groups = requirement.partition("[")
        if own == "fusion-detox" and bracket:
            for group in groups.rstrip("]").split(","):
                found += _requirements(group.strip())
        else:
            found.append(requirement)
    return list(dict.fromkeys(found))
