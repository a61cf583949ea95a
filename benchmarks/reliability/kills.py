"""Kills commands with SIGKILL, runs them again, and compares the result with an uninterrupted run.

    python -m benchmarks.reliability.kills [--kills 500]

Half of the kills come at a random time, the others before a random file operation. After one to
four of them, the same command runs to the end. Nothing may be lost, doubled or left over.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.reliability.commands import (
    RESULTS,
    SEED,
    Command,
    World,
    commands,
    import_what_is_used,
    leftovers,
    make_world,
    problem_of,
    run_child,
)
from fusion_detox.files.atomic import write_whole

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


def main() -> int:
    """Runs the audit; returns 1 if there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--only", choices=(*NAMES, *MORE), action="append")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json")
    args = parser.parse_args()
    names = args.only or NAMES
    record: dict[str, Any] = {"seed": args.seed, "commands": {}}
    if args.only and args.out.exists():  # the other commands stay
        record = json.loads(args.out.read_text())
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    world = make_world(folder / "world")
    for name in names:
        found = audit(commands()[name], world, folder / name, args.kills // len(names), args.seed)
        record["commands"][name] = found
        record["kills"] = sum(one["kills"] for one in record["commands"].values())
        print(name, json.dumps(found)[:3000], flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(record, indent=1).encode() + b"\n")
    failed = any(found["problems"] for found in record["commands"].values())
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
