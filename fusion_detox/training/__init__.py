"""Training a calibrator: ``train_calibrator`` and its settings."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_detox.training.corpus import Columns, Condition
    from fusion_detox.training.recipe import train_calibrator
    from fusion_detox.training.settings import TrainingConfig

__all__ = ["Columns", "Condition", "TrainingConfig", "train_calibrator"]

_HOMES = {
    "Columns": "corpus",
    "Condition": "corpus",
    "train_calibrator": "recipe",
    "TrainingConfig": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
