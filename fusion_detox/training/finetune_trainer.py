"""The training of an adapter by either contrastive objective, on ``transformers.Trainer``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from fusion_detox.training.contrast_trainer import ContrastiveTrainer
from fusion_detox.training.contrastive_batches import AnchorDraws, collate
from fusion_detox.training.contrastive_settings import ContrastiveConfig
from fusion_detox.training.finetune_settings import FinetuneConfig

if TYPE_CHECKING:
    from peft import PeftModel

    from fusion_detox.training.watch import Watch

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
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": share // at_once,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": min(config.warmup_steps, steps // 2),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_gradient_norm,
        "use_cpu": config.device == "cpu" or not torch.cuda.is_available(),
        "logging_steps": min(10, max(steps // 10, 1)),
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "report_to": [],
        "seed": config.seed,
        "data_seed": config.seed,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }


def contrastive_trainer(
    model: PeftModel,
    data: AnchorDraws,
    folder: Path,
    config: FinetuneConfig,
    contrast: ContrastiveConfig,
    watch: Watch,
    *,
    pad_id: int,
    steps: int,
    world_size: int,
) -> ContrastiveTrainer:
    """A trainer of ``model`` on anchors."""
    assert config.objective != "dpo"
    trainer = ContrastiveTrainer(
        model=model,
        args=TrainingArguments(
            **training_arguments(folder, config, steps=steps, world_size=world_size)
        ),
        train_dataset=data,
        data_collator=functools.partial(collate, pad_id=pad_id),
        callbacks=[watch],
    )
    trainer.precision = config.precision
    trainer.objective, trainer.contrast = config.objective, contrast
    # Else a model that takes any keyword counts as one that scales its loss by tokens.
    trainer.model_accepts_loss_kwargs = False
    return trainer
