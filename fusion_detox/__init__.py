"""Detoxify any Hugging Face causal language model while it writes.

A *calibrator* is a small language model that knows two next-token distributions: ``clean``, after
training on non-toxic text, and ``reference``, without it. Their difference is what non-toxic
training changes, and the processor adds it to the log-probs of the model that you use. That
model stays as it is, and its vocabulary may be another one. For a ``model`` with its
``tokenizer``, three lines do it::

    calibrator = Calibrator.from_pretrained("english-16k")
    processor = FusionLogitsProcessor(calibrator, tokenizer)
    model.generate(**inputs, do_sample=True, logits_processor=[processor])

The same processor serves every call of ``generate()``: sampling, greedy, beams, batches with
left padding. ``FusionConfig`` sets rule and strength; the calibrator's card carries the settings
recommended for it. ``train_calibrator`` makes a calibrator of your own text, as the command
``fusion-detox train-calibrator`` does. ``evaluate`` measures what fusion gains on your model and
what it costs, with a report: toxicity, fluency, diversity, change on harmless text by group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fusion_detox.alignment.alignment import Alignment, align
    from fusion_detox.alignment.config import AlignmentConfig
    from fusion_detox.alignment.store import load_alignment, save_alignment
    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.config import FusionConfig
    from fusion_detox.evaluation import EvaluationConfig, evaluate
    from fusion_detox.processor import FusionLogitsProcessor
    from fusion_detox.training import TrainingConfig, train_calibrator

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "Calibrator",
    "EvaluationConfig",
    "FusionConfig",
    "FusionLogitsProcessor",
    "TrainingConfig",
    "__version__",
    "align",
    "evaluate",
    "load_alignment",
    "save_alignment",
    "train_calibrator",
]

if not TYPE_CHECKING:
    __getattr__, _, _ = lazy_loader.attach(
        __name__,
        submod_attrs={
            "alignment.alignment": ["Alignment", "align"],
            "alignment.config": ["AlignmentConfig"],
            "alignment.store": ["load_alignment", "save_alignment"],
            "calibrator.calibrator": ["Calibrator"],
            "config": ["FusionConfig"],
            "evaluation": ["EvaluationConfig", "evaluate"],
            "processor": ["FusionLogitsProcessor"],
            "training": ["TrainingConfig", "train_calibrator"],
        },
    )

    def __dir__() -> list[str]:
        return __all__
