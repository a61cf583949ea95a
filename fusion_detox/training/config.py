"""Settings of a training run and their ranges; they define the command line's options."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from fusion_detox.config import check_settings, setting
from fusion_detox.errors import ConfigError

Precision = Literal["float32", "bfloat16"]
SaveDtype = Literal["float32", "float16", "bfloat16"]
CalibratorObjective = Literal[
    "language-modelling", "contrastive-perplexity", "signed-margin", "likelihood-ratio"
]


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of ``train_calibrator``; the command line shows each field's help.

    If the learning rate is ``None``, it is 2e-3 from scratch and 5e-5 from a base model.
    """

    base_steps: int = setting(
        2000, "Steps", "optimiser steps on general text before the fork (from scratch only)", 0
    )
    fork_steps: int = setting(
        700, "Steps", "steps of the clean model and of the reference after the fork", 1
    )
    batch_size: int = setting(16, "Steps", "blocks per step, over all processes", 1)
    objective: CalibratorObjective = setting(  # noqa: RUF009 - it returns a field
        "language-modelling",
        "Contrastive objective",
        "objective of the clean model: language-modelling, or contrastive-perplexity, "
        "signed-margin or likelihood-ratio on --pairs (after language modelling on --clean)",
    )
    objective_steps: int = setting(
        400, "Contrastive objective", "steps of the contrastive objective", 1
    )
    anchors: int = setting(12, "Contrastive objective", "anchors per step, over all processes", 1)
    objective_learning_rate: float = setting(
        5e-4, "Contrastive objective", "peak learning rate; decays linearly to 0", 0.0
    )
    learning_rate: float | None = setting(
        None, "Optimiser", "peak learning rate (2e-3 from scratch, 5e-5 from a base model)", 0.0
    )
    weight_decay: float = setting(0.1, "Optimiser", "AdamW weight decay", 0.0)
    max_gradient_norm: float = setting(1.0, "Optimiser", "gradient clipping", 0.0)
    warmup_steps: int = setting(100, "Optimiser", "linear warm-up of the first stage", 0)
    context_length: int = setting(
        128,
        "Model",
        "tokens per training block, and the calibrator's context",
        8,
    )
    vocabulary_size: int = setting(16_384, "Model", "vocabulary size of a new tokenizer", 300)
    hidden_size: int = setting(256, "Model", "hidden size of a model from scratch", 8)
    intermediate_size: int = setting(704, "Model", "feed-forward size of a model from scratch", 8)
    layers: int = setting(4, "Model", "layers of a model from scratch", 1)
    heads: int = setting(4, "Model", "attention heads of a model from scratch", 1)
    contrast_share: float | None = setting(
        None,
        "Data",
        "share of the reference's blocks after the fork that the clean model does not see (by "
        "default, the share in the corpora)",
        0.0,
        1.0,
    )
    held_out: float = setting(0.01, "Data", "share of the documents to hold out", 0.0, 0.5)
    tokenizer_characters: int = setting(
        40_000_000, "Data", "maximum number of characters to train the tokenizer on", 1000
    )
    precision: Precision = setting(  # noqa: RUF009 - it returns a field
        "float32", "Run", "float32, or bfloat16 autocast (for GPUs, and CPUs with AMX)"
    )
    save_dtype: SaveDtype = setting(  # noqa: RUF009 - it returns a field
        "float16", "Run", "dtype of the saved weights: float32, float16 or bfloat16"
    )
    evaluate_every: int = setting(250, "Run", "steps between evaluations on held-out text", 1)
    save_every: int = setting(200, "Run", "steps between checkpoints", 1)
    seed: int = setting(20261120, "Run", "random seed", 0)
    device: str | None = setting(None, "Run", "cpu or cuda (by default, cuda if available)")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device must be 'cpu' or 'cuda', but is {self.device!r}")
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}; "
                "change one of them"
            )

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON-ready values."""
        return dataclasses.asdict(self)
