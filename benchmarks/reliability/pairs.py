"""Runs two processes of one command on the same output at once.

    python -m benchmarks.reliability.pairs [--pairs 100]

Each must succeed, or be refused with an error that names the other process. At least one must
succeed, and the output must be that of a single run.
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
    end_child,
    import_what_is_used,
    leftovers,
    problem_of,
    run_child,
    start_child,
)
from benchmarks.reliability.record import run

SHARES = {
    "generate": 30,
    "evaluate": 15,
    "train-calibrator": 15,
    "tune": 10,
    "make-negatives": 20,
    "align": 10,
}


def audit(command: Command, world: World, folder: Path, pairs: int, seed: int) -> dict[str, Any]:
    """Runs ``pairs`` pairs of a command and returns counts and problems."""
    rng, counts = random.Random(seed), Counter[str]()
    problems: list[str] = []
    for name in ("first", "reference"):
        (folder / name).mkdir(parents=True)
        command.prepare(world, folder / name)
    import_what_is_used(command, world, folder / "first")
    reference = folder / "reference"
    began = time.monotonic()
    if problem := problem_of(run_child(command, world, reference)):
        raise RuntimeError(f"the single run failed: {problem}")
    seconds = time.monotonic() - began
    wanted = command.result(reference)
    for number in range(pairs):
        place = folder / str(number)
        place.mkdir()
        command.prepare(world, place)
        first = start_child(command, world, place)
        time.sleep(rng.choice([0.0, rng.uniform(0, seconds)]))
        second = start_child(command, world, place)
        both = [end_child(child, None) for child in (first, second)]
        counts["pairs"] += 1
        counts["refused"] += sum(one.code == 1 for one in both)
        found = [p for one in both if (p := problem_of(one, may_be_refused=True))]
        if not found and all(one.code for one in both):
            found = ["both were refused"]
        if not found and command.result(place) != wanted:
            found = ["the result differs from a single run's"]
        if not found and (left := leftovers(place)):
            found = [f"left over: {left}"]
        problems += [f"pair {number}: {problem}" for problem in found]
        if not found:
            shutil.rmtree(place)
    return {**counts, "problems": problems}


def cases(total: int, names: Sequence[str]) -> dict[str, int]:
    """More for the commands that take less time."""
    whole = sum(SHARES[name] for name in names)
    return {name: round(total * SHARES[name] / whole) for name in names}


if __name__ == "__main__":
    sys.exit(run(audit, "pairs", 100, tuple(SHARES), cases, about=__doc__))
