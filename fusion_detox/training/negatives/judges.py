"""The models behind the filters: toxicity, meaning, and likelihood."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fusion_detox.training.negatives.config import NegativesConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.scoring.base import Scorer

Embed = Callable[[Sequence[str]], Any]
"""Maps texts to unit vectors ``(texts, width)``, as an ``Embedder`` with ``unit_norm`` does."""

NllPerByte = Callable[[Sequence[str]], Sequence[float]]
"""Maps texts to their negative log-likelihood in nats per byte; nan if undefined."""


@dataclasses.dataclass(frozen=True)
class Judges:
    """The models whose scores the filters compare with their thresholds.

    Attributes:
        scorer: Toxicity: a name in ``fusion_detox.scoring.SCORERS``, or a scorer.
        embed: Meaning: a sentence-transformers model by folder or hub id, ``None`` for
            all-MiniLM-L6-v2, or a function from texts to unit vectors. Not used if
            ``min_similarity`` is ``None``.
        nll_per_byte: Likelihood: a causal language model by folder or hub id, or a function from
            texts to nats per byte; ``None`` disables this filter.
        device: The device of these models; the CPU by default.
        local_files_only: Never contact the hub.
    """

    scorer: str | Scorer = "contextual"
    embed: str | Embed | None = None
    nll_per_byte: str | NllPerByte | None = None
    device: str | None = None
    local_files_only: bool = False

    def load(self, config: NegativesConfig) -> tuple[Scorer, Embed | None, NllPerByte | None]:
        """Loads the models that a run's filters need.

        Raises:
            ConfigError: The scorer is unknown.
            MissingExtraError: A package is not installed.
            ModelNotFoundError: A model was not found and cannot be downloaded.
            ModelError: A model is damaged.
        """
        scorer, embed, nll_per_byte = self.scorer, self.embed, self.nll_per_byte
        place: dict[str, Any] = {"device": self.device, "local_files_only": self.local_files_only}
        if isinstance(scorer, str):
            from fusion_detox.scoring.registry import make_scorer

            scorer = make_scorer(scorer, **place)
        if config.min_similarity is None:
            embed = None
        elif embed is None or isinstance(embed, str):
            from fusion_detox.scoring.embedding import Embedder

            embed = Embedder(embed, unit_norm=True, **place)
        if config.max_nll_gap is None:
            nll_per_byte = None
        elif isinstance(nll_per_byte, str):
            from fusion_detox.files.models import load_target

            nll_per_byte = Likelihood(*load_target(nll_per_byte, **place), name=nll_per_byte)
        return scorer, embed, nll_per_byte


class Likelihood:
    """Mean negative log-likelihood in nats per byte, comparable across lengths and wordings.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        batch_size: Texts per forward pass.
        name: The model's name, for records.
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

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Nats per byte of each text; nan if it is empty or longer than the model's context.

        The first token counts only if another precedes it: the tokenizer's own start token, or a
        BOS, which is added if the tokenizer has one.
        """
        import torch

        rows = [self._ids(text) for text in texts]
        found = [math.nan] * len(texts)
        order = sorted((k for k, row in enumerate(rows) if row), key=lambda k: len(rows[k]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            own = [torch.tensor(rows[k]) for k in batch]
            ids = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in own], True)
            ids, mask = ids.to(self._model.device), mask.to(self._model.device)
            with torch.inference_mode():
                logits = self._model(input_ids=ids, attention_mask=mask).logits
            for place, k in enumerate(batch):
                scores, targets = logits[place, : len(rows[k]) - 1], ids[place, 1 : len(rows[k])]
                nats = float(
                    torch.nn.functional.cross_entropy(scores.float(), targets, reduction="sum")
                )
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
