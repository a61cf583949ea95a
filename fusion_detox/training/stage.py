"""One stage of training: a model, its blocks, and ``transformers.Trainer`` between them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fusion_detox.training.blocks import Blocks
from fusion_detox.training.loss import IGNORED, bits_per_byte, summed_cross_entropy
from fusion_detox.training.settings import TrainingConfig

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


class _Watch(TrainerCallback):
    """Progress, held-out measurements, and a checkpoint before an interrupt takes effect."""

    def __init__(
        self, title: str, held_out: dict[str, HeldOut], config: TrainingConfig, show: bool
    ) -> None:
        self.held_out, self.config, self.interrupted = held_out, config, False
        self.curve: list[dict[str, float]] = []
        self.progress = Progress(
            TextColumn(f"{title:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True),
            disable=not show,
        )
        self.task = self.progress.add_task(title, total=None, speed="", numbers="")
        self.numbers: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.curve.append({"step": state.global_step, "loss": logs["loss"]})
            self.numbers["loss"] = f"{logs['loss']:.3f}"

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        step, last = state.global_step, state.global_step == state.max_steps
        if (step % self.config.evaluate_every == 0 or last) and state.is_world_process_zero:
            assert model is not None
            plain = getattr(model, "module", model)
            entry: dict[str, float] = {"step": step}
            for name, text in self.held_out.items():
                entry[f"{name}_bits_per_byte"] = round(
                    text.bits_per_byte(plain, self.config.precision), 4
                )
                self.numbers[f"{name} bits/byte"] = f"{entry[f'{name}_bits_per_byte']:.3f}"
            self.curve.append(entry)
        rate = (step - self.first) / max(time.monotonic() - self.started, 1e-9)
        shown = "  ".join(f"{name} {value}" for name, value in self.numbers.items())
        self.progress.update(self.task, completed=step, speed=f"{rate:.2f} steps/s", numbers=shown)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.progress.stop()


@contextlib.contextmanager
def _interruptible(watch: _Watch) -> Iterator[None]:
    """The first Ctrl-C saves a checkpoint and stops; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: Any) -> None:
        if watch.interrupted:
            raise KeyboardInterrupt
        watch.interrupted = True
        logger.warning("stopping after this step, with a checkpoint (again: at once)")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
) -> list[dict[str, float]]:
    """Trains ``model`` in place and returns its loss curve.

    Checkpoints go to ``folder``; a run that finds a whole one there goes on from it, with the
    numbers that an uninterrupted run would give.

    Raises:
        KeyboardInterrupt: After the checkpoint of an interrupted run has been written.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size // world_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear" if decay else "constant_with_warmup",
        warmup_steps=min(warmup_steps, steps // 2),
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_gradient_norm,
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
        logging_steps=10,
        save_steps=config.save_every,
        save_total_limit=2,
        disable_tqdm=True,
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        average_tokens_across_devices=True,
    )
    watch = _Watch(title, held_out, config, show_progress)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=blocks,
        compute_loss_func=_loss,
        callbacks=[watch],
    )
    trainer.precision = config.precision
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    checkpoint = _newest_checkpoint(folder)
    curve_file = folder / "curve.json"
    if checkpoint is not None:
        logger.info("%s goes on from %s", title, checkpoint.name)
        if curve_file.exists():
            reached = int(checkpoint.name.rpartition("-")[2])
            watch.curve = [e for e in json.loads(curve_file.read_text()) if e["step"] <= reached]
    with _interruptible(watch):
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            watch.progress.stop()
            if folder.exists() and trainer.is_world_process_zero():
                curve_file.write_text(json.dumps(watch.curve))
    if watch.interrupted:
        raise KeyboardInterrupt
    return watch.curve


def _newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; what a kill left half-written is removed."""
    numbered = sorted(
        folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True
    )
    for checkpoint in numbered:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
                weights.keys()
            needed = ("optimizer.pt", "scheduler.pt")
            if all((checkpoint / name).stat().st_size for name in needed):
                return checkpoint
        except (OSError, ValueError, SafetensorError):
            pass
        logger.warning("%s is incomplete and is not used", checkpoint)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None
