"""The errors that the library raises. Each is also a ``ValueError`` or an ``OSError``."""

from __future__ import annotations


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
            f'Install it with: pip install "fusion-detox[{extra}]"'
        )
