"""What a user can do wrong, by name. Each error is also a ``ValueError`` or an ``OSError``."""

from __future__ import annotations


class FusionDetoxError(Exception):
    """Base of all errors raised on purpose by this library."""


class ConfigError(FusionDetoxError, ValueError):
    """An option is out of its range, or two options contradict each other."""


class CalibratorError(FusionDetoxError, ValueError):
    """A calibrator folder is incomplete, damaged or does not fit together."""


class CalibratorNotFoundError(FusionDetoxError, OSError):
    """No calibrator at that path, hub id or shipped name."""


class ModelError(FusionDetoxError, ValueError):
    """A model cannot serve as target, base or calibrator."""


class ModelNotFoundError(FusionDetoxError, OSError):
    """No model or tokenizer at that path or hub id."""


class VocabularyError(FusionDetoxError, ValueError):
    """Two vocabularies cannot be mapped, or a tokenizer does not belong to a model."""


class AlignmentError(FusionDetoxError, ValueError):
    """A calibrator's vectors cannot be carried over to a target, or an alignment is damaged."""


class DataError(FusionDetoxError, ValueError):
    """Training or prompt data cannot be used as it is."""


class DataFileError(FusionDetoxError, OSError):
    """A data file is missing or cannot be read or written."""


class TrainingError(FusionDetoxError, ValueError):
    """Training cannot start or go on with these settings."""


class EndpointError(FusionDetoxError, OSError):
    """A service that writes text rejects every request, or does not answer."""


class MissingExtraError(FusionDetoxError, ImportError, ValueError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs the package {package!r}, which is not installed. "
            f'Install it with: pip install "fusion-detox[{extra}]"'
        )
