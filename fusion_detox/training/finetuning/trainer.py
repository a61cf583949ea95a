"""What ``transformers.Trainer`` is told when an adapter is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusion_detox.training.contrastive.trainer import ANCHOR_ARGUMENTS
from fusion_detox.training.finetuning.config import FinetuneConfig
from fusion_detox.training.stage import common_arguments

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def training_arguments(
    folder: Path, config: FinetuneConfig, *, steps: int, world_size: int
) -> dict[str, Any]:
    """Arguments of ``TrainingArguments``, the same for every objective."""
    share = config.batch_size // world_size
    # The largest equal parts that fit; how a step is cut up does not change its result.
    at_once = max(
        part for part in range(1, min(config.micro_batch_size, share) + 1) if share % part == 0
    )
    return {
        **common_arguments(folder, config),
        **ANCHOR_ARGUMENTS,
        "max_steps": steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": share // at_once,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": min(config.warmup_steps, steps // 2),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_gradient_norm,
        "logging_steps": min(10, max(steps // 10, 1)),
    }
