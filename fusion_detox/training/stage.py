"""One stage of training with ``transformers.Trainer``, resuming from its newest checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers import ProgressCallback as TrainerProgressBar

from fusion_detox.errors import TrainingError
from fusion_detox.training.config import TrainingConfig
from fusion_detox.training.data.blocks import Blocks
from fusion_detox.training.loss import IGNORED, bits_per_byte, summed_cross_entropy
from fusion_detox.training.progress import ProgressCallback, interruptible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion_detox.training.finetuning.config import FinetuneConfig

logger = logging.getLogger(__name__)


class StageTrainer(Trainer):
    """``Trainer`` with autocast that keeps the logits in bfloat16.

    ``TrainingArguments(bf16=True)`` converts them to float32, which takes a third of the time per
    step on a CPU.
    """

    precision: str = "float32"

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """The context of the forward pass."""
        stack = contextlib.ExitStack()
        if self.precision != "float32":
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return stack


def _loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return summed_cross_entropy(outputs.logits, labels) / count


class HeldOut:
    """Held-out text for measuring a model's bits per byte.

    Args:
        blocks: The text.
        byte_lengths: Bytes of each token id, 0 for special tokens, which do not count.
    """

    def __init__(self, blocks: Blocks, byte_lengths: Sequence[int]) -> None:
        lengths = torch.tensor(byte_lengths)
        labels = torch.from_numpy(blocks.labels).long()
        sizes = torch.where(labels == IGNORED, 0, lengths[labels.clamp_min(0)])
        self.labels = labels.masked_fill(sizes == 0, IGNORED)
        self.ids = torch.from_numpy(blocks.ids).long()
        self.bytes = int(sizes.sum())

    @torch.no_grad()
    def bits_per_byte(self, model: torch.nn.Module, precision: str = "float32") -> float:
        """Measure a model's bits per byte; NaN if the text is empty."""
        if not self.bytes:
            return math.nan
        training, device = model.training, next(model.parameters()).device
        model.eval()
        total = 0.0
        cast = precision != "float32"
        for start in range(0, len(self.ids), 16):
            rows = slice(start, start + 16)
            with torch.autocast(device.type, torch.bfloat16, enabled=cast):
                logits = model(input_ids=self.ids[rows].to(device)).logits
            total += float(summed_cross_entropy(logits, self.labels[rows].to(device)))
        model.train(training)
        return bits_per_byte(total, self.bytes)


def common_arguments(folder: Path, config: TrainingConfig | FinetuneConfig) -> dict[str, Any]:
    """The ``TrainingArguments`` that all training runs share."""
    return {
        "output_dir": str(folder),
        "use_cpu": config.device == "cpu" or not torch.cuda.is_available(),
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "report_to": [],
        "seed": config.seed,
        "data_seed": config.seed,
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
    }


def run_stage(
    title: str,
    model: PreTrainedModel,
    blocks: Blocks,
    held_out: dict[str, HeldOut],
    config: TrainingConfig,
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    warmup_steps: int,
    decay: bool,
    world_size: int,
    show_progress: bool,
) -> list[dict[str, float | None]]:
    """Train ``model`` in place on language modelling and return its loss curve.

    Checkpoints are written to ``folder``. A run that finds a complete one there resumes from it and
    gives the same numbers as an uninterrupted run.

    Args:
        title: Title of the progress bar.
        model: The model.
        blocks: Training blocks, in order.
        held_out: Texts to measure bits per byte on, by name.
        config: Settings of the training.
        folder: Folder of the checkpoints.
        steps: Optimiser steps.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up, at most half of all.
        decay: Whether the learning rate then decays linearly to 0; otherwise it is constant.
        world_size: Number of processes.
        show_progress: Whether to show a progress bar on standard error.

    Raises:
        KeyboardInterrupt: The run was interrupted; its checkpoint has been written.
    """
    arguments = TrainingArguments(
        **common_arguments(folder, config),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size // world_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear" if decay else "constant_with_warmup",
        warmup_steps=min(warmup_steps, steps // 2),
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_gradient_norm,
        logging_steps=1,  # the callback averages
        average_tokens_across_devices=True,
    )
    callback = ProgressCallback(
        title,
        lambda unwrapped: {
            f"{name}_bits_per_byte": round(text.bits_per_byte(unwrapped, config.precision), 4)
            for name, text in held_out.items()
        },
        every=config.evaluate_every,
        shown=tuple(f"{name}_bits_per_byte" for name in held_out),
        show=show_progress,
        file=folder / "curve.json",
    )
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=blocks,
        compute_loss_func=_loss,
        callbacks=[callback],
    )
    trainer.precision = config.precision
    run_trainer(trainer, callback, folder)
    return callback.curve


def run_trainer(
    trainer: Trainer, callback: ProgressCallback, folder: Path, weights: str = "model.safetensors"
) -> None:
    """Train, resuming from the newest complete checkpoint if there is one.

    Args:
        trainer: The trainer.
        callback: Its progress callback.
        folder: Folder of its checkpoints.
        weights: Name of the weights file in a checkpoint.

    Raises:
        KeyboardInterrupt: The run was interrupted; its checkpoint has been written.
        TrainingError: One process sees several GPUs; ``Trainer`` would split batches over them
            without regard to rows that belong together.
    """
    gpus = trainer.args.n_gpu
    if gpus > 1:
        raise TrainingError(
            f"one process sees {gpus} GPUs: start one process per GPU with torchrun "
            f"--nproc-per-node {gpus} -m fusion_detox …, or set CUDA_VISIBLE_DEVICES=0 to use one"
        )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(TrainerProgressBar)
    checkpoint = _newest_checkpoint(folder, weights)
    if checkpoint is not None:
        logger.info("%s resumes from %s", callback.title, checkpoint.name)
        callback.resume(_step(checkpoint))
    with interruptible(callback):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if callback.interrupted:
        raise KeyboardInterrupt


def _newest_checkpoint(folder: Path, weights: str) -> Path | None:
    """The newest complete ``checkpoint-N``; removes newer, incomplete ones of a killed run."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            for file in _weight_files(checkpoint, weights):
                with safe_open(file, framework="pt") as tensors:
                    tensors.keys()
            needed = ("optimizer.pt", "scheduler.pt")
            if all((checkpoint / name).stat().st_size for name in needed):
                return checkpoint
        except (OSError, ValueError, KeyError, SafetensorError):
            pass
        logger.warning("%s is incomplete and is not used", checkpoint)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _weight_files(checkpoint: Path, name: str) -> list[Path]:
    """The weights file, or its shards."""
    index = checkpoint / f"{name}.index.json"
    if not index.exists():
        return [checkpoint / name]
    shards = json.loads(index.read_text())["weight_map"].values()
    return [checkpoint / shard for shard in sorted(set(shards))]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
