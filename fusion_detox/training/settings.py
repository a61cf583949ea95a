"""What a training run is told, with ranges. The command line's options are made from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from fusion_detox.errors import ConfigError

Precision = Literal["float32", "bfloat16"]
SaveDtype = Literal["float32", "float16", "bfloat16"]


def _setting(
    default: Any, group: str, text: str, low: float | None = None, high: float | None = None
) -> Any:
    return dataclasses.field(
        default=default, metadata={"group": group, "help": text, "low": low, "high": high}
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of ``train_calibrator``; each field's help is the command line's help.

    ``None`` for the learning rate means 2e-3 from scratch and 5e-5 from a given base model.
    """

    base_steps: int = _setting(
        2000, "Steps", "optimiser steps on general text before the fork (from scratch only)", 0
    )
    fork_steps: int = _setting(
        700, "Steps", "further steps of each model: clean, and reference beside it", 1
    )
    batch_size: int = _setting(16, "Steps", "blocks a step, over all processes together", 1)
    learning_rate: float | None = _setting(
        None, "Optimiser", "peak learning rate (2e-3 from scratch, 5e-5 from a base model)", 0.0
    )
    weight_decay: float = _setting(0.1, "Optimiser", "AdamW weight decay", 0.0)
    max_gradient_norm: float = _setting(1.0, "Optimiser", "gradient clipping", 0.0)
    warmup_steps: int = _setting(100, "Optimiser", "linear warm-up of the first stage", 0)
    context_length: int = _setting(
        128, "Model", "tokens that the calibrator sees, and the length of a training block", 8
    )
    vocabulary_size: int = _setting(16_384, "Model", "tokens of a tokenizer from scratch", 300)
    hidden_size: int = _setting(256, "Model", "width of a model from scratch", 8)
    intermediate_size: int = _setting(704, "Model", "width of its feed-forward layers", 8)
    layers: int = _setting(4, "Model", "its layers", 1)
    heads: int = _setting(4, "Model", "its attention heads", 1)
    contrast_share: float | None = _setting(
        None,
        "Data",
        "share of the reference's fork that is text which the clean model does not see "
        "(its natural share where not given)",
        0.0,
        1.0,
    )
    held_out: float = _setting(0.01, "Data", "share of the documents held out", 0.0, 0.5)
    tokenizer_characters: int = _setting(
        40_000_000, "Data", "characters that the tokenizer is trained on at most", 1000
    )
    precision: Precision = _setting(  # noqa: RUF009 - it returns a field
        "float32", "Run", "float32, or bfloat16 autocast (for GPUs, and CPUs with AMX)"
    )
    save_dtype: SaveDtype = _setting(  # noqa: RUF009 - it returns a field
        "float16", "Run", "of the saved weights: float32, float16, bfloat16"
    )
    evaluate_every: int = _setting(250, "Run", "steps between two looks at the held-out text", 1)
    save_every: int = _setting(200, "Run", "steps between two checkpoints", 1)
    seed: int = _setting(20261120, "Run", "seed of everything random", 0)
    device: str | None = _setting(None, "Run", "cpu or cuda (a GPU where there is one)")

    def __post_init__(self) -> None:
        for name, known in (("precision", Precision), ("save_dtype", SaveDtype)):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(known))}, "
                    f"not {getattr(self, name)!r}"
                )
        if self.device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device must be 'cpu' or 'cuda', not {self.device!r}")
        for field in dataclasses.fields(self):
            value, low, high = (
                getattr(self, field.name),
                field.metadata["low"],
                field.metadata["high"],
            )
            if value is None or low is None:
                continue
            top = math.inf if high is None else high
            if not isinstance(value, (int, float)) or math.isnan(value) or not low <= value <= top:
                most = "" if high is None else f" and at most {high:g}"
                raise ConfigError(
                    f"{field.name} must be a number of at least {low:g}{most}, but is {value!r}"
                )
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads {self.heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return dataclasses.asdict(self)
