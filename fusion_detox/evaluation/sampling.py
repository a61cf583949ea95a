"""Continuations of all prompts in one setting, batch by batch, with what they cost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fusion_detox.evaluation.processes import Processes
from fusion_detox.evaluation.samples import Sample, SampleFiles
from fusion_detox.generation import Job, Sampling, complete_batch, prompt_ids

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
"""Told ``(what, done, total)`` after each step of long work."""


class Cost(NamedTuple):
    """What continuations cost: tokens, seconds and the most memory seen, in bytes."""

    tokens: int
    seconds: float
    memory: int

    @property
    def tokens_per_second(self) -> float | None:
        """``None`` where nothing was timed."""
        return self.tokens / self.seconds if self.seconds > 0 else None


class Sampler:
    """Writes continuations with one target.

    Args:
        model: The target.
        tokenizer: Its own.
        sampling: How to draw; its seed is replaced by that of each call.
        batch_size: Texts at a time.
        processes: Among which the work is shared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        batch_size: int,
        processes: Processes,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.sampling, self.batch_size, self.processes = sampling, batch_size, processes

    def encode(self, jobs: Sequence[Job]) -> dict[int, list[int]]:
        """Tokens of each prompt by its index.

        Raises:
            DataError: A prompt with its continuation exceeds the model's context.
        """
        prompts = {job.index: job for job in jobs}
        return {
            index: prompt_ids(self.model, self.tokenizer, job, self.sampling.max_new_tokens)
            for index, job in prompts.items()
        }

    def run(
        self,
        jobs: Sequence[Job],
        seed: int,
        files: SampleFiles,
        processor: LogitsProcessor | None,
        *,
        costs: Path,
        report: Callable[[int], None],
    ) -> None:
        """Writes what is missing of ``jobs``, each continuation at once.

        A continuation depends on the seed, its prompt's index and its number only, so that every
        setting draws with the same noise, and any batch, order or interruption gives the same.

        Args:
            jobs: All that is wanted; this process does its share of what is not there.
            seed: Of the noise.
            files: Where it is written.
            processor: Fusion or word filter; ``None`` for the target alone.
            costs: JSON Lines file for tokens, seconds and memory of each batch.
            report: Called with the number of rows written since the last call.
        """
        encoded = self.encode(jobs)
        pending = files.missing(jobs, seed)
        self.processes.wait()  # or one process would see what another has just written as done
        # Texts of like length waste the least padding.
        pending.sort(key=lambda job: (len(encoded[job.index]), job.index, job.sample))
        pending = self.processes.share(pending)
        sampling = dataclasses.replace(self.sampling, seed=seed)
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        with files.open() as writer:
            for start in range(0, len(pending), self.batch_size):
                batch = pending[start : start + self.batch_size]
                began = time.perf_counter()
                rows = complete_batch(
                    self.model,
                    self.tokenizer,
                    batch,
                    [encoded[job.index] for job in batch],
                    sampling,
                    processor,
                )
                seconds = time.perf_counter() - began
                for job, row in zip(batch, rows, strict=True):
                    finish = "stop" if row.finished else "length"
                    writer.write(
                        Sample(seed, job.index, job.sample, row.token_ids, row.text, finish)
                    )
                cost = Cost(
                    sum(len(r.token_ids) for r in rows), seconds, memory_in_use(self.model.device)
                )
                _append_cost(costs, cost, warm_up=start == 0)
                report(len(batch))
        self.processes.wait()


def memory_in_use(device: torch.device) -> int:
    """Bytes: the accelerator's peak since the last reset, else what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def total_cost(folder: Path, stem: str) -> Cost:
    """What a setting's continuations cost in all; the first batch of each start is warm-up.

    Warm-up counts only where there is nothing else.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"{stem}.*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            with contextlib.suppress(ValueError):  # torn by a kill: one batch is not timed
                rows.append(json.loads(line))
    timed = [row for row in rows if not row["warm_up"]] or rows
    return Cost(
        sum(row["tokens"] for row in timed),
        sum(row["seconds"] for row in timed),
        max((row["memory"] for row in rows), default=0),
    )


def _append_cost(path: Path, cost: Cost, *, warm_up: bool) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({**cost._asdict(), "warm_up": warm_up}) + "\n")
