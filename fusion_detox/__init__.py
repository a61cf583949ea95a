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

from fusion_detox.files.lazy import lazy_names

if TYPE_CHECKING:
    from fusion_detox.alignment.alignment import Alignment, align
    from fusion_detox.alignment.config import AlignmentConfig
    from fusion_detox.alignment.store import load_alignment, save_alignment
    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.config import FusionConfig
    from fusion_detox.evaluation import EvaluationConfig, evaluate
    from fusion_detox.processor import FusionLogitsProcessor
    from fusion_detox.training import TrainingConfig, train_calibrator

__version__ = "0.2.0"

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
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Alignment": "alignment.alignment",
            "AlignmentConfig": "alignment.config",
            "Calibrator": "calibrator.calibrator",
            "EvaluationConfig": "evaluation",
            "FusionConfig": "config",
            "FusionLogitsProcessor": "processor",
            "TrainingConfig": "training",
            "align": "alignment.alignment",
            "evaluate": "evaluation",
            "load_alignment": "alignment.store",
            "save_alignment": "alignment.store",
            "train_calibrator": "training",
        },
    )
