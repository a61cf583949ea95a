"""How toxic a text is, by whichever scorer; nothing here steers a model.

``make_scorer("lexical")`` and the other names of ``SCORERS`` make one. Importing this package loads
neither torch nor numpy; a scorer's libraries are loaded when it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from fusion_detox.scoring.base import NoTextScoredError, Scorer, ScoringError
    from fusion_detox.scoring.cache import CachedScorer
    from fusion_detox.scoring.classifier import ClassifierScorer
    from fusion_detox.scoring.contextual import ContextualScorer
    from fusion_detox.scoring.detoxify_scorer import DetoxifyPackageScorer, load_detoxify
    from fusion_detox.scoring.embedding import Embedder
    from fusion_detox.scoring.lexical import LexicalScorer
    from fusion_detox.scoring.perspective import PerspectiveScorer
    from fusion_detox.scoring.registry import SCORERS, make_scorer

__all__ = [
    "SCORERS",
    "CachedScorer",
    "ClassifierScorer",
    "ContextualScorer",
    "DetoxifyPackageScorer",
    "Embedder",
    "LexicalScorer",
    "NoTextScoredError",
    "PerspectiveScorer",
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
            "detoxify_scorer": ["DetoxifyPackageScorer", "load_detoxify"],
            "embedding": ["Embedder"],
            "lexical": ["LexicalScorer"],
            "perspective": ["PerspectiveScorer"],
            "registry": ["SCORERS", "make_scorer"],
        },
    )
