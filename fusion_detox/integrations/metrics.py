"""Metrics of fusion for those who operate a server: counters and a histogram, and no text.

    metrics = FusionMetrics()
    processor = MeasuredProcessor(processor, metrics)  # then use it as before

    metrics.snapshot().mean_strength

``fusion_detox.integrations.prometheus`` serves them to Prometheus.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from fusion_detox.errors import ConfigError
from fusion_detox.processor import FusionLogitsProcessor, Rows, Strengths

__all__ = ["FusionMetrics", "MeasuredProcessor", "Snapshot"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Snapshot(NamedTuple):
    """The metrics at one moment, since the process started.

    Attributes:
        steps: Decoding steps.
        tokens: Rows of these steps. A row is one token of one text, unless the engine discards it,
            as it does with rejected drafts.
        fused_tokens: Those with a strength above 0.
        held_back_tokens: Those of the fused whose most probable token was no longer the most
            probable after fusion.
        strength_sum: Sum of the strengths of all fused tokens, as settings or requests ask for
            them; ``context_kl`` and ``kl_budget`` may lower them further.
        seconds_sum: Time in fusion, in seconds. It is wall-clock time in the calling thread.
        buckets: Upper bounds of the time per step, in seconds, and how many steps took at most
            that; the last bound is infinity.
    """

    steps: int
    tokens: int
    fused_tokens: int
    held_back_tokens: int
    strength_sum: float
    seconds_sum: float
    buckets: tuple[tuple[float, int], ...]

    @property
    def mean_strength(self) -> float:
        """The mean strength of fused tokens; 0 if there are none."""
        return self.strength_sum / self.fused_tokens if self.fused_tokens else 0.0


class FusionMetrics:
    """Counts what any number of processors and threads of this process report.

    Args:
        bounds: Upper bounds of the histogram of seconds per step, in ascending order.

    Raises:
        ConfigError: ``bounds`` is empty or does not ascend.
    """

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        self._bounds = tuple(bounds)
        if not self._bounds or list(self._bounds) != sorted(set(self._bounds)):
            raise ConfigError(f"bounds must be ascending seconds, but are {list(bounds)}")
        self._lock = threading.Lock()
        self._counts = [0] * (len(self._bounds) + 1)
        self._tokens = self._fused = self._held_back = 0
        self._strength = self._seconds = 0.0

    def observe(self, strengths: Sequence[float], held_back: int, seconds: float) -> None:
        """Add one step.

        Args:
            strengths: The strength of each row.
            held_back: See ``Snapshot.held_back_tokens``.
            seconds: How long the step took.
        """
        place = bisect.bisect_left(self._bounds, seconds)
        fused = sum(strength > 0 for strength in strengths)
        with self._lock:
            self._counts[place] += 1
            self._tokens += len(strengths)
            self._fused += fused
            self._held_back += held_back
            self._strength += sum(strengths)
            self._seconds += seconds

    def snapshot(self) -> Snapshot:
        """All metrics of one moment."""
        with self._lock:
            cumulative = tuple(
                zip((*self._bounds, float("inf")), accumulate(self._counts), strict=True)
            )
            return Snapshot(
                sum(self._counts),
                self._tokens,
                self._fused,
                self._held_back,
                self._strength,
                self._seconds,
                cumulative,
            )


class MeasuredProcessor(FusionLogitsProcessor):
    """A processor that reports each step to ``FusionMetrics``; its scores are the same.

    Args:
        processor: The processor, whose models and caches it shares.
        metrics: Where to report. ``with_settings`` and ``following`` return processors that report
            to the same. ``with_strength`` does not report.
    """

    def __init__(self, processor: FusionLogitsProcessor, metrics: FusionMetrics) -> None:
        self.__dict__.update(vars(processor))
        self._metrics = metrics

    def fuse_rows(
        self,
        rows: Rows,
        scores: Tensor,
        strength: Strengths | None = None,
    ) -> Tensor:
        """``FusionLogitsProcessor.fuse_rows``, reported."""
        strengths = self._strengths_of(len(rows), strength)
        began = time.perf_counter()
        fused = super().fuse_rows(rows, scores, strengths)
        held_back = 0
        if fused is not scores:
            # Rows of strength 0 are unchanged. On a GPU, this waits until the step is finished.
            held_back = int((fused.argmax(-1) != scores.argmax(-1)).sum())
        self._metrics.observe(strengths, held_back, time.perf_counter() - began)
        return fused
