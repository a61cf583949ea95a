"""Generates the continuations of all prompts for one variant, and records what they cost."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fusion_detox.evaluation.heap import Heap
from fusion_detox.evaluation.machine import Processes
from fusion_detox.evaluation.samples import Sample, SampleFiles
from fusion_detox.generation.sampling import Job, Sampling, complete_batch, prompt_ids

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
"""Called with ``(what, done, total)`` after each step of long work."""


class Cost(NamedTuple):
    """What continuations cost: tokens, seconds and peak memory in bytes."""

    tokens: int
    seconds: float
    memory: int

    @property
    def tokens_per_second(self) -> float | None:
        """Speed, or ``None`` if nothing was timed."""
        return self.tokens / self.seconds if self.seconds > 0 else None


class Sampler:
    """Generates the continuations of one target and stores them.

    Args:
        model: The target.
        tokenizer: The target's tokenizer.
        batch_size: Texts per batch.
        processes: The processes that share the work.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        processes: Processes,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.processes = batch_size, processes
        self._heap = Heap()

    def encode(self, jobs: Sequence[Job], new_tokens: int) -> dict[int, list[int]]:
        """Token ids by prompt index; raises ``DataError`` if ``new_tokens`` more do not fit."""
        prompts = {job.index: job for job in jobs}
        return {
            index: prompt_ids(self.model, self.tokenizer, job, new_tokens)
            for index, job in prompts.items()
        }

    def run(
        self,
        jobs: Sequence[Job],
        encoded: Mapping[int, Sequence[int]],
        samplings: Sequence[Sampling],
        processor: LogitsProcessor | None,
        folder: Path,
        stem: str,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        """Generates the missing continuations of ``jobs`` and writes each batch immediately.

        A continuation depends only on the seed, the prompt's index and the sample's number. All
        variants therefore share their noise, and batch size, order and interruptions do not
        change a result.

        Args:
            jobs: All continuations of a seed. This process generates its share of the missing ones.
            encoded: Token ids of each prompt; see :meth:`encode`.
            samplings: How to sample. There is one per seed, and each samples all jobs.
            processor: Fusion or word filter; ``None`` for the target alone.
            folder: The run's folder. Continuations go to ``samples``; tokens, seconds and memory of
                each batch go to ``costs``.
            stem: Names the files; see ``SampleFiles``.
            report: Called with ``(done, total)`` continuations. Other processes are assumed to
                keep pace.
        """
        report = report or (lambda done, total: None)
        rank = self.processes.rank
        files = SampleFiles(folder / "samples", stem, rank)
        pending = files.missing(jobs, [sampling.seed for sampling in samplings])
        self.processes.wait()  # otherwise a process might count what another has just written
        total = len(jobs) * len(samplings)
        done = total - sum(map(len, pending.values()))
        report(done, total)
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        with files.open() as write:
            for sampling in samplings:
                own = pending[sampling.seed]
                # Texts of similar length need the least padding.
                own.sort(key=lambda job: (len(encoded[job.index]), job.index, job.sample))
                own = self.processes.share(own)
                for start in range(0, len(own), self.batch_size):
                    batch = own[start : start + self.batch_size]
                    cost = self._complete(batch, encoded, sampling, processor, write)
                    _append_cost(folder / "costs" / f"{stem}.{rank}.jsonl", cost, start == 0)
                    self._heap.watch()
                    done += len(batch) * self.processes.count
                    report(min(done, total), total)
        report(total, total)
        self.processes.wait()

    def _complete(
        self,
        batch: Sequence[Job],
        encoded: Mapping[int, Sequence[int]],
        sampling: Sampling,
        processor: LogitsProcessor | None,
        write: Callable[[Sample], None],
    ) -> Cost:
        ids = [encoded[job.index] for job in batch]
        began = time.perf_counter()
        rows = complete_batch(self.model, self.tokenizer, batch, ids, sampling, processor)
        seconds = time.perf_counter() - began
        for job, row in zip(batch, rows, strict=True):
            finish = "stop" if row.finished else "length"
            write(Sample(sampling.seed, job.index, job.sample, row.token_ids, row.text, finish))
        tokens = sum(len(row.token_ids) for row in rows)
        return Cost(tokens, seconds, memory_in_use(self.model.device))


def memory_in_use(device: torch.device) -> int:
    """Memory in bytes: an accelerator's peak since its reset, or the process's current memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def total_cost(folder: Path, stem: str) -> Cost:
    """The total cost of a variant's continuations.

    The first batch of each start is a warm-up, which counts only if there is no other batch.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"{stem}.*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            with contextlib.suppress(ValueError):  # a line torn by a kill loses one batch's timing
                rows.append(json.loads(line))
    timed = [row for row in rows if not row["warm_up"]] or rows
    return Cost(
        sum(row["tokens"] for row in timed),
        sum(row["seconds"] for row in timed),
        max((row["memory"] for row in rows), default=0),
    )


def _append_cost(path: Path, cost: Cost, warm_up: bool) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({**cost._asdict(), "warm_up": warm_up}) + "\n")
