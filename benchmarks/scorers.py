"""The two toxicity scorers of the benchmarks, both of the package.

Neither took part in choosing any model's training text. ``train_scorers.py`` trains them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusion_detox.scoring.base import Scorer
from fusion_detox.scoring.contextual import CONTEXTUAL, ContextualScorer, head
from fusion_detox.scoring.embedding import Embedder
from fusion_detox.scoring.lexical import LexicalScorer

__all__ = [
    "CONTEXTUAL",
    "SCORERS",
    "ContextualScorer",
    "Embedder",
    "Scorer",
    "head",
    "scorer_record",
]

SCORERS: dict[str, Callable[[], Scorer]] = {
    "lexical": LexicalScorer.load,
    "contextual": ContextualScorer,
}


def scorer_record(name: str) -> dict[str, Any]:
    """Training record and AUCs of a scorer."""
    return LexicalScorer.record() if name == "lexical" else ContextualScorer.training_record()
