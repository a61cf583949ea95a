"""The steps of an evaluation, and how far the whole of it has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion_detox.evaluation.sampling import Progress

WHOLE = "whole run"
"""What the progress of all steps together is reported as, in units of work."""


class Plan:
    """Reports the progress of each step and of the whole run.

    Work that an earlier call has done does not count, neither as done nor as left, so that the time
    left can be estimated from the time spent.

    Args:
        steps: The work of each step, in order. Only the proportions matter.
        report: Receives ``(what, done, total)``.
    """

    def __init__(self, steps: Mapping[str, int], report: Progress) -> None:
        self._steps, self._report = dict(steps), report
        self._numbers = {name: number for number, name in enumerate(steps, 1)}
        self._done = 0.0
        self.finished = 0
        self.worked = False
        """Whether any step had something left to do; the caller may set it back."""

    def __str__(self) -> str:
        return f"{self.finished} of {len(self._numbers)} steps are done"

    def start(self, name: str) -> Callable[[int, int], None]:
        """Begins a step, and returns the function to call with its ``(done, total)``."""
        self.finished = self._numbers[name] - 1
        label = f"step {self._numbers[name]} of {len(self._numbers)}: {name}"
        before, first = self._done, -1
        work = self._steps[name]

        def told(done: int, total: int) -> None:
            nonlocal first
            if first < 0:
                first = done
                self._steps[name] = round(work * (1 - done / total)) if total else 0
            self.worked = self.worked or done > first
            share = (done - first) / (total - first) if total > first else 1.0
            self._done = before + self._steps[name] * share
            if done == total:
                self.finished = self._numbers[name]
            self._report(WHOLE, round(self._done), sum(self._steps.values()))
            self._report(label, done, total)

        return told
