"""Kills commands with SIGKILL, runs them again, and compares the result with an uninterrupted run.

    python -m benchmarks.reliability.kills [--kills 500]

Half of the kills come at a random time, the others before a random file operation. After one to
four of them, the same command runs to the end. Nothing may be lost, doubled or left over.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability.commands import (
    Command,
    World,
    import_what_is_used,
    leftovers,
    problem_of,
    run_child,
)
from benchmarks.reliability.record import run

NAMES = ("generate", "evaluate", "train-calibrator", "tune", "make-negatives")
MORE = ("finetune", "align")


def audit(command: Command, world: World, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills a command ``kills`` times and returns counts and problems."""
    rng, counts = random.Random(seed), Counter[str]()
    problems: list[str] = []
    for name in ("first", "reference"):
        (folder / name).mkdir(parents=True)
        command.prepare(world, folder / name)
    import_what_is_used(command, world, folder / "first")
    reference = folder / "reference"
    began = time.monotonic()
    ended = run_child(command, world, reference)
    seconds = time.monotonic() - began
    if problem := problem_of(ended):
        raise RuntimeError(f"the uninterrupted run failed: {problem}")
    wanted = command.result(reference)
    while counts["kills"] < kills:
        counts["sequences"] += 1
        place = folder / str(counts["sequences"])
        place.mkdir()
        command.prepare(world, place)
        plan: list[dict[str, Any]] = []
        for _ in range(min(rng.randint(1, 4), kills - counts["kills"])):
            by_time = rng.random() < 0.5
            kill: dict[str, Any] = (
                {"seconds": rng.uniform(0, seconds)}
                if by_time
                else {"change": rng.randint(1, ended.changes)}
            )
            plan.append(kill)
            found = run_child(command, world, place, **kill)
            if found.code == -9:
                counts["kills"] += 1
                counts["by time" if by_time else "by file operation"] += 1
            elif problem := problem_of(found):
                problems.append(f"{plan}: {problem}")
            else:
                counts["finished before the kill"] += 1
        last = run_child(command, world, place)
        if problem := problem_of(last):
            problems.append(f"{plan}, then to the end: {problem}")
        elif command.result(place) != wanted:
            problems.append(f"{plan}: the result differs from an uninterrupted run's")
        elif left := leftovers(place):
            problems.append(f"{plan}: left over: {left}")
        else:
            shutil.rmtree(place)
    return {**counts, "file operations": ended.changes, "problems": problems}


def cases(total: int, names: Sequence[str]) -> dict[str, int]:
    """The same number for each command."""
    return dict.fromkeys(names, total // len(names))


if __name__ == "__main__":
    sys.exit(run(audit, "kills", 500, NAMES, cases, more=MORE, about=__doc__))
