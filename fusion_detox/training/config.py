"""What a training run is told, with ranges. The command line's options are made from it."""

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
    """Settings of ``train_calibrator``; each field's help is the command line's help.

    ``None`` for the learning rate means 2e-3 from scratch and 5e-5 from a given base model.
    """

    base_steps: int = setting(
        2000, "Steps", "optimiser steps on general text before the fork (from scratch only)", 0
    )
    fork_steps: int = setting(
        700, "Steps", "further steps of each model: clean, and reference beside it", 1
    )
    batch_size: int = setting(16, "Steps", "blocks a step, over all processes together", 1)
    objective: CalibratorObjective = setting(  # noqa: RUF009 - it returns a field
        "language-modelling",
        "Contrastive objective",
        "of the clean model: language-modelling alone, or one of contrastive-perplexity, "
        "signed-margin, likelihood-ratio after it (or alone, without --clean), from --pairs",
    )
    objective_steps: int = setting(
        400, "Contrastive objective", "steps of the contrastive objective", 1
    )
    anchors: int = setting(
        12, "Contrastive objective", "anchors a step, over all processes together", 1
    )
    objective_learning_rate: float = setting(
        5e-4, "Contrastive objective", "peak, falling linearly to 0", 0.0
    )
    learning_rate: float | None = setting(
        None, "Optimiser", "peak learning rate (2e-3 from scratch, 5e-5 from a base model)", 0.0
    )
    weight_decay: float = setting(0.1, "Optimiser", "AdamW weight decay", 0.0)
    max_gradient_norm: float = setting(1.0, "Optimiser", "gradient clipping", 0.0)
    warmup_steps: int = setting(100, "Optimiser", "linear warm-up of the first stage", 0)
    context_length: int = setting(
        128, "Model", "tokens that the calibrator sees, and the length of a training block", 8
    )
    vocabulary_size: int = setting(16_384, "Model", "tokens of a tokenizer from scratch", 300)
    hidden_size: int = setting(256, "Model", "width of a model from scratch", 8)
    intermediate_size: int = setting(704, "Model", "width of its feed-forward layers", 8)
    layers: int = setting(4, "Model", "its layers", 1)
    heads: int = setting(4, "Model", "its attention heads", 1)
    contrast_share: float | None = setting(
        None,
        "Data",
        "share of the reference's fork that is text which the clean model does not see "
        "(its natural share where not given)",
        0.0,
        1.0,
    )
    held_out: float = setting(0.01, "Data", "share of the documents held out", 0.0, 0.5)
    tokenizer_characters: int = setting(
        40_000_000, "Data", "characters that the tokenizer is trained on at most", 1000
    )
    precision: Precision = setting(  # noqa: RUF009 - it returns a field
        "float32", "Run", "float32, or bfloat16 autocast (for GPUs, and CPUs with AMX)"
    )
    save_dtype: SaveDtype = setting(  # noqa: RUF009 - it returns a field
        "float16", "Run", "of the saved weights: float32, float16, bfloat16"
    )
    evaluate_every: int = setting(250, "Run", "steps between two looks at the held-out text", 1)
    save_every: int = setting(200, "Run", "steps between two checkpoints", 1)
    seed: int = setting(20261120, "Run", "seed of everything random", 0)
    device: str | None = setting(None, "Run", "cpu or cuda (a GPU where there is one)")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device must be 'cpu' or 'cuda', not {self.device!r}")
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return dataclasses.asdict(self)
