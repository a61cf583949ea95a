"""Continuations of all prompts in one setting, batch by batch, with what they cost."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fusion_detox.evaluation.processes import Processes
from fusion_detox.evaluation.samples import Sample, SampleFiles, SampleWriter
from fusion_detox.generation.sampling import Job, Sampling, complete_batch, prompt_ids

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
        batch_size: Texts at a time.
        processes: Among which the work is shared.
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

    def encode(self, jobs: Sequence[Job], new_tokens: int) -> dict[int, list[int]]:
        """Tokens of each prompt by its index.

        Raises:
            DataError: A prompt with ``new_tokens`` more exceeds the model's context.
        """
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
        report: Callable[[int, int], None],
    ) -> None:
        """Writes what is missing of ``jobs``, each continuation at once.

        A continuation depends on the seed, its prompt's index and its number only, so that every
        setting draws with the same noise, and any batch, order or interruption gives the same.

        Args:
            jobs: All that is wanted; this process does its share of what is not there.
            encoded: Tokens of each prompt, see :meth:`encode`.
            samplings: How to draw; each with another seed, which draws all jobs anew.
            processor: Fusion or word filter; ``None`` for the target alone.
            folder: The run's; continuations go to its ``samples``, and tokens, seconds and memory
                of each batch to its ``costs``.
            stem: Names the files, see ``SampleFiles``.
            report: Told ``(done, total)`` continuations; other processes seem to keep pace.
        """
        rank = self.processes.rank
        files = SampleFiles(folder / "samples", stem, rank)
        pending = files.missing(jobs, [sampling.seed for sampling in samplings])
        self.processes.wait()  # or one process would see what another has just written as done
        total = len(jobs) * len(samplings)
        done = total - sum(map(len, pending.values()))
        report(done, total)
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        with files.open() as writer:
            for sampling in samplings:
                own = pending[sampling.seed]
                # Texts of like length waste the least padding.
                own.sort(key=lambda job: (len(encoded[job.index]), job.index, job.sample))
                own = self.processes.share(own)
                for start in range(0, len(own), self.batch_size):
                    batch = own[start : start + self.batch_size]
                    ids = [encoded[job.index] for job in batch]
                    cost = self._batch(batch, ids, sampling, processor, writer)
                    _append_cost(folder / "costs" / f"{stem}.{rank}.jsonl", cost, start == 0)
                    done += len(batch) * self.processes.count
                    report(min(done, total), total)
        report(total, total)
        self.processes.wait()

    def _batch(
        self,
        batch: Sequence[Job],
        ids: Sequence[Sequence[int]],
        sampling: Sampling,
        processor: LogitsProcessor | None,
        writer: SampleWriter,
    ) -> Cost:
        began = time.perf_counter()
        rows = complete_batch(self.model, self.tokenizer, batch, ids, sampling, processor)
        seconds = time.perf_counter() - began
        for job, row in zip(batch, rows, strict=True):
            finish = "stop" if row.finished else "length"
            writer.write(
                Sample(sampling.seed, job.index, job.sample, row.token_ids, row.text, finish)
            )
        tokens = sum(len(row.token_ids) for row in rows)
        return Cost(tokens, seconds, memory_in_use(self.model.device))


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


def _append_cost(path: Path, cost: Cost, warm_up: bool) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({**cost._asdict(), "warm_up": warm_up}) + "\n")
