"""Measures the benefit and the cost of fusion: prompts, sampling, metrics, report.

``evaluate`` writes a run into a folder, ``rescore`` scores its continuations again, and ``tune``
finds settings on development prompts. The commands of ``fusion-detox`` have the same names. Only
integrations and the command line may import this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fusion_detox.evaluation.config import EvaluationConfig
    from fusion_detox.evaluation.pipeline import evaluate, rescore
    from fusion_detox.evaluation.prompts.prompt_sets import Prompt, PromptSet, read_prompt_set
    from fusion_detox.evaluation.tuning import tune

__all__ = [
    "EvaluationConfig",
    "Prompt",
    "PromptSet",
    "evaluate",
    "read_prompt_set",
    "rescore",
    "tune",
]

if not TYPE_CHECKING:
    __getattr__, __dir__, _ = lazy_loader.attach(
        __name__,
        submod_attrs={
            "config": ["EvaluationConfig"],
            "pipeline": ["evaluate", "rescore"],
            "prompts.prompt_sets": ["Prompt", "PromptSet", "read_prompt_set"],
            "tuning": ["tune"],
        },
    )
