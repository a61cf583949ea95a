"""How probable a text is under a causal language model, a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Likelihood:
    """Mean negative log-likelihood in nats a byte, which texts of any length and wording compare.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        batch_size: Texts at a time.
        name: For the record.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        name: str = "",
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._batch_size, self.name = batch_size, name

    @classmethod
    def load(
        cls, model: str, *, device: str | None = None, local_files_only: bool = False
    ) -> Likelihood:
        """Loads a model by folder or hub id.

        Raises:
            ModelNotFoundError: It is not here and cannot be downloaded.
            ModelError: It is damaged or no causal language model.
        """
        from fusion_detox.files.models import load_target

        loaded, tokenizer = load_target(model, device=device, local_files_only=local_files_only)
        return cls(loaded, tokenizer, name=model)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Nats a byte of each text; nan where it is empty or longer than the model's context.

        The first token counts where something stands before it: the tokenizer's own start, or a
        BOS, which is put there where the model has one.
        """
        rows = [self._ids(text) for text in texts]
        found = [math.nan] * len(texts)
        order = sorted((k for k, row in enumerate(rows) if row), key=lambda k: len(rows[k]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            width = max(len(rows[k]) for k in batch)
            padded = [rows[k] + [0] * (width - len(rows[k])) for k in batch]
            mask = [[1] * len(rows[k]) + [0] * (width - len(rows[k])) for k in batch]
            ids = torch.tensor(padded, device=self._model.device)
            masks = torch.tensor(mask, device=self._model.device)
            logits = self._model(input_ids=ids, attention_mask=masks).logits
            for place, k in enumerate(batch):
                own = logits[place, : len(rows[k]) - 1].float()
                targets = ids[place, 1 : len(rows[k])]
                nats = float(torch.nn.functional.cross_entropy(own, targets, reduction="sum"))
                size = len(texts[k].encode("utf-8", "surrogatepass"))
                found[k] = nats / size if math.isfinite(nats) else math.nan
        return found

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = list(self._tokenizer(text)["input_ids"]) if text.strip() else []
        bos = self._tokenizer.bos_token_id
        if ids and bos is not None and ids[0] != bos:
            ids = [int(bos), *ids]
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return [] if len(ids) < 2 or (limit and len(ids) > limit) else ids
