"""Detoxify any Hugging Face causal language model at decoding time.

A *calibrator* is a pair of small language models that share a start: ``clean`` was trained further
on non-toxic text, and ``reference`` on text of all kinds (the expert and anti-expert of DExperts).
Their difference shows what non-toxic training changes, and the processor adds it to the log-probs
of your model. Your model stays unchanged, and its vocabulary may differ from the
calibrator's. For a ``model`` and its ``tokenizer``, three lines suffice::

    calibrator = Calibrator.from_pretrained("english-16k")
    processor = FusionLogitsProcessor(calibrator, tokenizer)
    model.generate(**inputs, do_sample=True, logits_processor=[processor])

One processor serves every call of ``generate()``: sampling, greedy or beam search, and batches
with left padding. ``FusionConfig`` sets the rule and the strength; by default, the processor uses
the settings that the calibrator recommends. ``train_calibrator`` (``fusion-detox
train-calibrator`` on the command line) trains a calibrator on your own text. ``evaluate`` measures
the benefit and the cost of fusion on your model. Its report covers toxicity, fluency, diversity,
and the change on harmless text for each group.
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
    from fusion_detox.evaluation.report import write_explanation
    from fusion_detox.generation.explanation import explain_text
    from fusion_detox.processor import FusionLogitsProcessor, RowwiseProcessor
    from fusion_detox.training import TrainingConfig, train_calibrator

__version__ = "0.2.0"

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "Calibrator",
    "EvaluationConfig",
    "FusionConfig",
    "FusionLogitsProcessor",
    "RowwiseProcessor",
    "TrainingConfig",
    "__version__",
    "align",
    "evaluate",
    "explain_text",
    "load_alignment",
    "save_alignment",
    "train_calibrator",
    "write_explanation",
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
            "evaluation.report": ["write_explanation"],
            "generation.explanation": ["explain_text"],
            "processor": ["FusionLogitsProcessor", "RowwiseProcessor"],
            "training": ["TrainingConfig", "train_calibrator"],
        },
    )

    def __dir__() -> list[str]:
        return __all__
