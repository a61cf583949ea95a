"""Train calibrators, and fine-tune whole models with the same data.

``train_calibrator`` is the main entry point; ``data`` reads the text, ``contrastive`` holds the
contrastive objectives, ``finetuning`` trains adapters, and ``negatives`` has a language model write
toxic paraphrases. Only ``evaluation``, ``integrations`` and the command line may import this
package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fusion_detox.training.config import TrainingConfig
    from fusion_detox.training.contrastive.config import ContrastiveConfig
    from fusion_detox.training.data.corpus import Columns, Condition
    from fusion_detox.training.data.pairs import ParaphraseSet, read_pairs
    from fusion_detox.training.finetuning.config import FinetuneConfig
    from fusion_detox.training.finetuning.pipeline import finetune
    from fusion_detox.training.negatives.pipeline import make_negatives
    from fusion_detox.training.pipeline import train_calibrator

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
    __getattr__, __dir__, _ = lazy_loader.attach(
        __name__,
        submod_attrs={
            "config": ["TrainingConfig"],
            "contrastive.config": ["ContrastiveConfig"],
            "data.corpus": ["Columns", "Condition"],
            "data.pairs": ["ParaphraseSet", "read_pairs"],
            "finetuning.config": ["FinetuneConfig"],
            "finetuning.pipeline": ["finetune"],
            "negatives.pipeline": ["make_negatives"],
            "pipeline": ["train_calibrator"],
        },
    )
