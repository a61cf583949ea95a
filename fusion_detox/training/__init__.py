"""Training a calibrator: ``train_calibrator`` and its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion_detox.lazy import lazy_names

if TYPE_CHECKING:
    from fusion_detox.training.contrastive_settings import ContrastiveConfig
    from fusion_detox.training.corpus import Columns, Condition
    from fusion_detox.training.finetune_recipe import finetune
    from fusion_detox.training.finetune_settings import FinetuneConfig
    from fusion_detox.training.negatives.run import make_negatives
    from fusion_detox.training.pairs import ParaphraseSet, read_pairs
    from fusion_detox.training.recipe import train_calibrator
    from fusion_detox.training.settings import TrainingConfig

__all__ = [
    "Columns",
    "Condition",
    "ContrastiveConfig",
    "FinetuneConfig",
    "ParaphraseSet",
    "TrainingConfig",
    "finetune",
    "make_negatives",
    "read_pairs",
    "train_calibrator",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Columns": "corpus",
            "Condition": "corpus",
            "ParaphraseSet": "pairs",
            "make_negatives": "negatives.run",
            "read_pairs": "pairs",
            "ContrastiveConfig": "contrastive_settings",
            "FinetuneConfig": "finetune_settings",
            "finetune": "finetune_recipe",
            "train_calibrator": "recipe",
            "TrainingConfig": "settings",
        },
    )
