"""Toxicity scorers behind one interface. They measure text and never steer a model.

``make_scorer("lexical")`` makes a scorer by name; ``SCORERS`` lists the names. Importing this
package loads neither torch nor numpy: a scorer's libraries load when the scorer is made. Training,
evaluation, integrations and the command line may import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fusion_detox.scoring.base import NoTextScoredError, Scorer, ScoringError
    from fusion_detox.scoring.cache import CachedScorer
    from fusion_detox.scoring.classifier import ClassifierScorer
    from fusion_detox.scoring.contextual import ContextualScorer
    from fusion_detox.scoring.detoxify import load_detoxify
    from fusion_detox.scoring.embedding import Embedder
    from fusion_detox.scoring.lexical import LexicalScorer
    from fusion_detox.scoring.registry import SCORERS, make_scorer

__all__ = [
    "SCORERS",
    "CachedScorer",
    "ClassifierScorer",
    "ContextualScorer",
    "Embedder",
    "LexicalScorer",
    "NoTextScoredError",
    "Scorer",
    "ScoringError",
    "load_detoxify",
    "make_scorer",
]

if not TYPE_CHECKING:
    __getattr__, __dir__, _ = lazy_loader.attach(
        __name__,
        submod_attrs={
            "base": ["NoTextScoredError", "Scorer", "ScoringError"],
            "cache": ["CachedScorer"],
            "classifier": ["ClassifierScorer"],
            "contextual": ["ContextualScorer"],
            "detoxify": ["load_detoxify"],
            "embedding": ["Embedder"],
            "lexical": ["LexicalScorer"],
            "registry": ["SCORERS", "make_scorer"],
        },
    )
