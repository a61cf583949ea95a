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

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion_detox.calibrator import Calibrator
    from fusion_detox.config import FusionConfig
    from fusion_detox.evaluation import EvaluationConfig, evaluate
    from fusion_detox.processor import FusionLogitsProcessor
    from fusion_detox.training import TrainingConfig, train_calibrator

__version__ = "0.1.0"

__all__ = [
    "Calibrator",
    "EvaluationConfig",
    "FusionConfig",
    "FusionLogitsProcessor",
    "TrainingConfig",
    "__version__",
    "evaluate",
    "train_calibrator",
]

_MODULES = {
    "Calibrator": "fusion_detox.calibrator",
    "EvaluationConfig": "fusion_detox.evaluation",
    "FusionConfig": "fusion_detox.config",
    "FusionLogitsProcessor": "fusion_detox.processor",
    "TrainingConfig": "fusion_detox.training",
    "evaluate": "fusion_detox.evaluation",
    "train_calibrator": "fusion_detox.training",
}

if not TYPE_CHECKING:  # a type checker is to see the imports above, and to report other names

    def __getattr__(name: str) -> object:
        """Imports a public name when it is first used, for torch takes seconds to import."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
