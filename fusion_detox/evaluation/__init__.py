"""What fusion gains and what it costs, measured: prompts, sampling, scorers, metrics, report.

``evaluate`` runs all of it into a folder; ``rescore`` judges the stored continuations again;
``tune`` finds settings on development prompts. ``fusion-detox evaluate`` is the same as a command.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion_detox.evaluation.config import EvaluationConfig
    from fusion_detox.evaluation.prompts import Prompt, PromptSet, read_prompt_set
    from fusion_detox.evaluation.run import evaluate, rescore
    from fusion_detox.evaluation.tune import tune

__all__ = [
    "EvaluationConfig",
    "Prompt",
    "PromptSet",
    "evaluate",
    "read_prompt_set",
    "rescore",
    "tune",
]
_MODULES = {
    "EvaluationConfig": "config",
    "Prompt": "prompts",
    "PromptSet": "prompts",
    "evaluate": "run",
    "read_prompt_set": "prompts",
    "rescore": "run",
    "tune": "tune",
}

if not TYPE_CHECKING:  # a type checker is to see the imports above

    def __getattr__(name: str) -> object:
        """Imports a public name when it is first used, for torch takes seconds to import."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
