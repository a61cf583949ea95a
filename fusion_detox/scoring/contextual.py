"""A small network on top of sentence embeddings, which scores the meaning of a text.

Like the lexical scorer, it was trained on human labels only (``benchmarks/train_scorers.py``) and
was not used to select any model's training text. ``contextual.json``, next to the weights, names
the data and the AUCs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fusion_detox.errors import DataFileError
from fusion_detox.scoring.base import TOXICITY, Scorer, score_batches
from fusion_detox.scoring.embedding import Embedder
from fusion_detox.scoring.sources import weights_hash

CONTEXTUAL = Path(__file__).with_name("contextual.safetensors")


def head(width: int) -> nn.Sequential:
    """Two layers, from embeddings ``(…, width)`` to logits ``(…, 1)``."""
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(width, 256), nn.GELU(), nn.Dropout(0.4), nn.Linear(256, 1)
    )


class ContextualScorer(Scorer):
    """Probability that people would call a text toxic, from its meaning.

    Args:
        device: Device of the embedding model, the CPU by default.
        batch_size: Texts per batch.

    Raises:
        MissingExtraError: The package that provides all-MiniLM-L6-v2 is not installed.
        DataFileError: The network's weights are missing or damaged.
        ConfigError: The device does not exist.
    """

    name = "contextual"

    def __init__(self, *, device: str | torch.device | None = None, batch_size: int = 64) -> None:
        self.embedder = Embedder(device=device, batch_size=batch_size)
        self.head = head(self.embedder.width).eval()
        try:
            self.head.load_state_dict(load_file(CONTEXTUAL))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise DataFileError(
                f"cannot read the contextual scorer's weights at {CONTEXTUAL}: {error}; "
                "reinstall the package"
            ) from error

    @classmethod
    def training_record(cls) -> dict[str, Any]:
        """Training data, licences and measured AUCs of the shipped scorer."""
        record: dict[str, Any] = json.loads(CONTEXTUAL.with_suffix(".json").read_text("utf-8"))
        return record

    def record(self) -> dict[str, Any]:
        """``training_record`` plus the weights hash, the embedding model and truncation."""
        embeddings = self.embedder.record()
        return {
            **self.training_record(),
            "weights": weights_hash(CONTEXTUAL),
            "licence": "Apache-2.0",
            "embeddings": embeddings,
            "truncation": embeddings["truncation"],
        }

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """Scores for ``"toxicity"``, its only type; nan for a text that failed.

        Raises:
            NoTextScoredError: Every text failed.
        """
        return score_batches(
            self._batch,
            texts,
            name=self.name,
            types=[TOXICITY],
            batch_size=self.embedder.batch_size,
        )

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> dict[str, list[float]]:
        logits = self.head(self.embedder(texts)).squeeze(1)
        return {TOXICITY: torch.sigmoid(logits).tolist()}
