"""How toxic a text is, by whichever scorer; nothing here steers a model.

``make_scorer("lexical")`` and the other names of ``SCORERS`` make one. Importing this package loads
neither torch nor numpy; a scorer's libraries are loaded when it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion_detox.files.lazy import lazy_names

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
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "SCORERS": "registry",
            "CachedScorer": "cache",
            "ClassifierScorer": "classifier",
            "ContextualScorer": "contextual",
            "DetoxifyPackageScorer": "detoxify_scorer",
            "Embedder": "embedding",
            "LexicalScorer": "lexical",
            "NoTextScoredError": "base",
            "PerspectiveScorer": "perspective",
            "Scorer": "base",
            "ScoringError": "base",
            "load_detoxify": "detoxify_scorer",
            "make_scorer": "registry",
        },
    )
