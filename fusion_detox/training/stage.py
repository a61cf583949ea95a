"""One stage of training: a model, its blocks, and ``transformers.Trainer`` between them."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers import ProgressCallback as TrainerProgressBar

from fusion_detox.errors import TrainingError
from fusion_detox.training.checkpoints import newest_checkpoint, step_of
from fusion_detox.training.config import TrainingConfig
from fusion_detox.training.data.blocks import Blocks
from fusion_detox.training.loss import IGNORED, bits_per_byte, summed_cross_entropy
from fusion_detox.training.progress import ProgressCallback, interruptible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class StageTrainer(Trainer):
    """``Trainer`` with autocast that leaves the logits in bfloat16.

    ``TrainingArguments(bf16=True)`` converts them to float32, which on a CPU is a third of a step.
    """

    precision: str = "float32"

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """What the forward pass runs in."""
        stack = contextlib.ExitStack()
        if self.precision != "float32":
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return stack


def _loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return summed_cross_entropy(outputs.logits, labels) / count


class HeldOut:
    """Held-out text on which a model's bits per byte are measured.

    Args:
        blocks: Its blocks.
        byte_lengths: Bytes of each token id, 0 for special ones, which do not count.
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
        """Bits that the model needs for a byte of this text; NaN where there is none."""
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


class Kept(Protocol):
    """The settings of a training that decide where it runs and what is kept of it."""

    @property
    def device(self) -> str | None: ...  # noqa: D102
    @property
    def save_every(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102


def kept_arguments(folder: Path, config: Kept) -> dict[str, Any]:
    """What all trainings tell ``TrainingArguments``: where to run, what to keep and to show."""
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
    """Trains ``model`` in place and returns its loss curve.

    Checkpoints go to ``folder``; a run that finds a whole one there goes on from it, with the
    numbers that an uninterrupted run would give.

    Raises:
        KeyboardInterrupt: After the checkpoint of an interrupted run has been written.
    """
    arguments = TrainingArguments(
        **kept_arguments(folder, config),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size // world_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear" if decay else "constant_with_warmup",
        warmup_steps=min(warmup_steps, steps // 2),
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_gradient_norm,
        logging_steps=10,
        average_tokens_across_devices=True,
    )
    watch = ProgressCallback(
        title,
        lambda plain: {
            f"{name}_bits_per_byte": round(text.bits_per_byte(plain, config.precision), 4)
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
        callbacks=[watch],
    )
    trainer.precision = config.precision
    run_trainer(trainer, watch, folder)
    return watch.curve


def run_trainer(
    trainer: Trainer, watch: ProgressCallback, folder: Path, weights: str = "model.safetensors"
) -> None:
    """Trains, from the newest whole checkpoint of ``folder`` where there is one.

    Args:
        trainer: What trains.
        watch: Its callback.
        folder: Where it writes checkpoints.
        weights: Name of the weights' file in a checkpoint.

    Raises:
        KeyboardInterrupt: After the checkpoint of an interrupted run has been written.
        TrainingError: One process sees several GPUs, over which ``Trainer`` would split batches by
            rows, whatever belongs together.
    """
    gpus = trainer.args.n_gpu
    if gpus > 1:
        raise TrainingError(
            f"one process sees {gpus} GPUs: start one for each with torchrun --nproc-per-node "
            f"{gpus} -m fusion_detox …, or show it a single one with CUDA_VISIBLE_DEVICES=0"
        )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(TrainerProgressBar)
    checkpoint = newest_checkpoint(folder, weights)
    if checkpoint is not None:
        logger.info("%s goes on from %s", watch.title, checkpoint.name)
        watch.resume(step_of(checkpoint))
    with interruptible(watch):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if watch.interrupted:
        raise KeyboardInterrupt
