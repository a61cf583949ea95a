"""The models behind the filters, by name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fusion_detox.training.negatives.config import NegativesConfig
from fusion_detox.training.negatives.filters import Embed, PerByte

if TYPE_CHECKING:
    from fusion_detox.scoring.base import Scorer


@dataclasses.dataclass(frozen=True)
class Judges:
    """What judges the answers beside the thresholds.

    Attributes:
        scorer: Toxicity: a name of ``fusion_detox.scoring.SCORERS``, or a scorer.
        embed: Meaning: ``None`` for all-MiniLM-L6-v2, a sentence-transformers model by folder or
            hub id, or any function from texts to unit vectors. Not used at a ``min_similarity`` of
            ``None``.
        per_byte: Probability: a causal language model by folder or hub id, or any function from
            texts to nats a byte; ``None`` for no such filter.
        device: Where these models compute; the CPU by default.
        local_files_only: Never contact the hub.
    """

    scorer: str | Scorer = "contextual"
    embed: str | Embed | None = None
    per_byte: str | PerByte | None = None
    device: str | None = None
    local_files_only: bool = False


def load_judges(
    judges: Judges, config: NegativesConfig
) -> tuple[Scorer, Embed | None, PerByte | None]:
    """What a run's filters need, and no more.

    Raises:
        ConfigError: There is no such scorer.
        MissingExtraError: A package is not installed.
        ModelNotFoundError: A model is not here and cannot be downloaded.
        ModelError: A model is damaged.
    """
    scorer, embed, per_byte = judges.scorer, judges.embed, judges.per_byte
    if isinstance(scorer, str):
        from fusion_detox.scoring.registry import make_scorer

        scorer = make_scorer(scorer, device=judges.device, local_files_only=judges.local_files_only)
    if config.min_similarity is None:
        embed = None
    elif embed is None or isinstance(embed, str):
        from fusion_detox.scoring.embedding import Embedder

        embed = Embedder(
            embed,
            device=judges.device,
            unit_norm=True,
            local_files_only=judges.local_files_only,
        )
    if isinstance(per_byte, str):
        from fusion_detox.training.negatives.nll_gap import Likelihood

        per_byte = Likelihood.load(
            per_byte, device=judges.device, local_files_only=judges.local_files_only
        )
    return scorer, embed, per_byte
