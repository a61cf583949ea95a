"""How toxic a text is, for the demo and the benchmarks; nothing here steers a model."""

from fusion_detox.scoring.lexical import LexicalScorer

__all__ = ["LexicalScorer"]
