"""Progress bar, held-out measurements and interruption of a training run."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusion_detox.files.atomic import write_whole

logger = logging.getLogger(__name__)
Measure = Callable[[torch.nn.Module], Mapping[str, float | None]]


class ProgressCallback(TrainerCallback):
    """Shows progress, measures the model, and saves a checkpoint on Ctrl-C.

    Args:
        title: Title of the bar.
        measure: Returns named numbers for the current model; called in the main process only,
            before the first step and during training.
        every: Steps between measurements.
        shown: Names of the numbers to show beside the bar.
        show: Whether to show a bar on standard error.
        file: Where to save the curve, for a killed run to resume.
        log_every: Steps per recorded loss, their mean. The trainer must log every step, so that a
            run that resumes from any checkpoint records the same means.

    Attributes:
        curve: Losses and measurements by step.
        interrupted: Whether to stop after the current step.
    """

    def __init__(
        self,
        title: str,
        measure: Measure,
        *,
        every: int,
        shown: tuple[str, ...],
        show: bool,
        file: Path,
        log_every: int = 10,
    ) -> None:
        self.title, self.measure, self.every, self.shown = title, measure, every, shown
        self.interrupted = False
        self.file, self.log_every = file, log_every
        self.curve: list[dict[str, float | None]] = []
        self.numbers: dict[str, str] = {}
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

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Start the bar; measure a new run before its first step."""
        self.started, self.first = time.monotonic(), state.global_step
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self.progress.start()
        if state.global_step == 0:
            self._add_measurement(state, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Record the mean loss of the last steps."""
        step = state.global_step
        if not logs or "loss" not in logs or step % self.log_every:
            return
        # The history is part of a checkpoint.
        losses = [
            float(entry["loss"])
            for entry in state.log_history[-2 * self.log_every :]
            if "loss" in entry and step - self.log_every < entry["step"] <= step
        ]
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss):
            logger.warning("the loss is %s at step %d", loss, step)
        self.numbers["loss"] = f"{loss:.3f}"
        self._add({"step": step, "loss": loss}, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Advance the bar, measure if due, and stop with a checkpoint if interrupted."""
        step = state.global_step
        if step % self.every == 0 or step == state.max_steps:
            self._add_measurement(state, model)
        rate = (step - self.first) / max(time.monotonic() - self.started, 1e-9)
        numbers = "  ".join(f"{name} {value}" for name, value in self.numbers.items())
        self.progress.update(
            self.task, completed=step, speed=f"{rate:.2f} steps/s", numbers=numbers
        )
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def resume(self, step: int) -> None:
        """Load the curve of an earlier run, up to the step of its checkpoint."""
        if self.file.exists():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            self.curve = [entry for entry in kept if entry["step"] <= step]

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop the bar."""
        self.progress.stop()

    def _add_measurement(self, state: TrainerState, model: torch.nn.Module | None) -> None:
        if not state.is_world_process_zero:
            return
        assert model is not None
        found = self.measure(getattr(model, "module", model))
        self._add({"step": state.global_step, **found}, state)
        for name in self.shown:
            value = found.get(name)
            if value is not None:
                self.numbers[name.replace("_", " ")] = f"{value:.3f}"

    def _add(self, entry: dict[str, float | None], state: TrainerState) -> None:
        """Append to the curve, and save it before the next checkpoint, which refers to it."""
        self.curve.append(entry)
        if state.is_world_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, json.dumps(self.curve).encode())


@contextlib.contextmanager
def interruptible(callback: ProgressCallback) -> Iterator[None]:
    """On Ctrl-C, save a checkpoint and stop; on a second one, stop at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        if callback.interrupted:
            raise KeyboardInterrupt
        callback.interrupted = True
        logger.warning("saving a checkpoint after this step; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        callback.progress.stop()
