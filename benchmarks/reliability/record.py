"""The command line of an audit, and its record, written after each command that is audited."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability.commands import RESULTS, SEED, Command, World, commands, make_world
from fusion_detox.files.atomic import write_whole

Audit = Callable[[Command, World, Path, int, int], dict[str, Any]]
"""Given a command, its world, a folder, how many cases, and a seed: counts and problems."""


def run(
    audit: Audit,
    unit: str,
    total: int,
    names: Sequence[str],
    cases: Callable[[int, Sequence[str]], dict[str, int]],
    *,
    more: Sequence[str] = (),
    about: str | None = None,
) -> int:
    """Runs an audit of several commands; returns 1 if there is a problem.

    Args:
        audit: The audit of one command.
        unit: What its cases are called.
        total: How many there are by default.
        names: The commands.
        cases: Given a total and the commands, how many cases each gets.
        more: Commands that are audited only on request.
        about: What the audit does.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(f"--{unit}", dest="total", type=int, default=total)
    parser.add_argument("--only", choices=(*names, *more), action="append")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{unit}.json")
    args = parser.parse_args()
    record: dict[str, Any] = {"seed": args.seed, "commands": {}}
    if args.only and args.out.exists():  # the other commands stay
        record = json.loads(args.out.read_text())
    folder = Path(tempfile.mkdtemp(prefix=f"{unit}-"))
    world = make_world(folder / "world")
    for name, count in cases(args.total, args.only or names).items():
        found = audit(commands()[name], world, folder / name, count, args.seed)
        record["commands"][name] = found
        record[unit] = sum(one[unit] for one in record["commands"].values())
        print(name, json.dumps(found)[:3000], flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(record, indent=1).encode() + b"\n")
    failed = any(found["problems"] for found in record["commands"].values())
    if not failed:
        shutil.rmtree(folder)
    return int(failed)
