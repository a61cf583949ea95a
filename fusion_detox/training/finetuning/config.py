"""What ``finetune`` is told, with ranges. The command line's options are made from it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from fusion_detox.config import check_settings, setting
from fusion_detox.errors import ConfigError
from fusion_detox.training.config import Precision

FinetuneObjective = Literal["contrastive-perplexity", "signed-margin", "likelihood-ratio", "dpo"]


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Settings of ``finetune``; each field's help is the command line's help.

    Learning rate, batch (2, with 3 accumulated) and epochs are those of arXiv 2401.08491. Rank and
    scale of the adapter are customary values of ours.
    """

    objective: FinetuneObjective = setting(  # noqa: RUF009 - it returns a field
        "contrastive-perplexity",
        "Objective",
        "contrastive-perplexity (the paper's), signed-margin, likelihood-ratio (ours) or dpo",
    )
    epochs: float = setting(1.0, "Steps", "passes over the anchors (dpo: over the pairs)", 0.001)
    steps: int | None = setting(None, "Steps", "optimiser steps, in place of --epochs", 1)
    batch_size: int = setting(
        6, "Steps", "anchors (dpo: pairs) a step, over all processes and micro-batches together", 1
    )
    micro_batch_size: int = setting(2, "Steps", "of which in memory at a time, at most", 1)
    learning_rate: float = setting(2.2e-5, "Optimiser", "peak, falling linearly to 0", 0.0)
    weight_decay: float = setting(0.0, "Optimiser", "AdamW weight decay", 0.0)
    max_gradient_norm: float = setting(1.0, "Optimiser", "gradient clipping", 0.0)
    warmup_steps: int = setting(0, "Optimiser", "linear warm-up", 0)
    rank: int = setting(16, "Adapter", "rank of the LoRA matrices", 1)
    scale: float = setting(32.0, "Adapter", "LoRA's alpha: its product is scaled by alpha/rank", 0)
    adapter_dropout: float = setting(0.0, "Adapter", "on the adapter's input", 0.0, 0.9)
    context_length: int = setting(128, "Data", "tokens of a text at most, BOS included", 8)
    held_out: float = setting(
        0.05, "Data", "share of the anchors, and of the general text, that is only measured", 0, 0.5
    )
    dpo_beta: float = setting(0.1, "Objective", "dpo: beta", 1e-6)
    dpo_pairs: int = setting(5, "Objective", "dpo: pairs drawn per anchor at most", 1)
    precision: Precision = setting(  # noqa: RUF009 - it returns a field
        "float32", "Run", "float32, or bfloat16 autocast"
    )
    evaluate_every: int = setting(50, "Run", "steps between two looks at the held-out anchors", 1)
    save_every: int = setting(50, "Run", "steps between two checkpoints", 1)
    seed: int = setting(20261120, "Run", "seed of everything random", 0)
    device: str | None = setting(None, "Run", "cpu or cuda (a GPU where there is one)")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device must be 'cpu' or 'cuda', not {self.device!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return dataclasses.asdict(self)
