"""Runs two processes of one command on the same output at once.

    python -m benchmarks.reliability.pairs [--pairs 100]

Each must succeed, or be refused with an error that names the other process. At least one must
succeed, and the output must be that of a single run.
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
    end_child,
    import_what_is_used,
    leftovers,
    make_world,
    problem_of,
    run_child,
    start_child,
)
from fusion_detox.files.atomic import write_whole

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


def main() -> int:
    """Runs the audit; returns 1 if there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--only", choices=SHARES, action="append")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=RESULTS / "pairs.json")
    args = parser.parse_args()
    record: dict[str, Any] = {"seed": args.seed, "commands": {}}
    if args.only and args.out.exists():  # the other commands stay
        record = json.loads(args.out.read_text())
    folder = Path(tempfile.mkdtemp(prefix="pairs-"))
    world = make_world(folder / "world")
    shares = {name: SHARES[name] for name in args.only or SHARES}
    for name, share in shares.items():
        pairs = round(args.pairs * share / sum(shares.values()))
        found = audit(commands()[name], world, folder / name, pairs, args.seed)
        record["commands"][name] = found
        record["pairs"] = sum(one["pairs"] for one in record["commands"].values())
        print(name, json.dumps(found)[:3000], flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(record, indent=1).encode() + b"\n")
    failed = any(found["problems"] for found in record["commands"].values())
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
