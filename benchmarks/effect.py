"""Evaluate the shipped calibrator on a target, with prompts on which nothing was tuned.

    python -m recipes.english_data --data DATA --out WORK
    python -m benchmarks.effect --data DATA --work WORK --runs RUNS challenging
    python -m benchmarks.effect … --target packaged:smollm2 --out smollm2_harmless harmless
    torchrun --nproc-per-node 2 -m benchmarks.effect …        (distributes the work)

Runs ``fusion_detox.evaluate`` and copies the report and its numbers to ``benchmarks/results/NAME``.
The continuations stay in RUNS, because they are offensive. The harmless text is the held-out part
of the general text (task dialogues, topical chats, encyclopedia): 64 tokens from each of 64 texts.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path

import torch

from fusion_detox.evaluation import EvaluationConfig, evaluate, read_prompt_set

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SWEEP = [
    "default",
    "wordfilter",
    *(f"default:strength={strength:g}" for strength in (1, 2, 5)),
    "default:strength=1.5,context_kl=none",
    *(f"mixture:strength={strength}" for strength in (0.2, 0.4)),
]
RUNS = {
    "challenging": (["rtp:challenging=rtp_challenging.jsonl"], None, SWEEP),
    "nontoxic": (["rtp=rtp_nontoxic.jsonl"], 300, ["default", "wordfilter"]),
    "groups": (["bold=bold_prompts.jsonl.gz"], 600, ["default", "wordfilter"]),
    # Side effects on a real target: harmless text, assistants' answers, groups of people.
    "harmless": (["rtp=rtp_nontoxic.jsonl"], 20, ["default"]),
}
SMALL = {"samples": 2, "similarity": False, "suites": ("identity", "dialect"), "group_texts": 80}
"""Sizes of the run ``harmless``, since real targets are slow on a CPU."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(RUNS))
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="output of recipes.english_data")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--target", default=str(ROOT / "examples" / "demo_target" / "model"))
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--out", help="name of the results (default: the name of the run)")
    parser.add_argument("--settings", nargs="+", help="replaces the run's settings")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(args.threads)

    sources, limit, settings = RUNS[args.name]
    sets = []
    for source in sources:
        kind, _, file = source.partition("=")
        sets.append(read_prompt_set(str(args.data / file), kind=kind, limit=limit))
    harmless = args.runs / "harmless.jsonl"
    args.runs.mkdir(parents=True, exist_ok=True)
    with (args.work / "test_general.jsonl").open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["source"] == "general"]
    long = [row["text"] for row in rows if len(row["text"]) >= 400]
    harmless.write_text("".join(json.dumps({"text": text}) + "\n" for text in long))

    sizes = SMALL if args.name == "harmless" else {"hatecheck": args.data / "hatecheck.jsonl.gz"}
    folder = args.runs / (args.out or args.name)
    results = evaluate(
        args.target,
        sets,
        folder,
        calibrator=args.calibrator,
        settings=args.settings or settings,
        config=EvaluationConfig(harmless=harmless, batch_size=32, **sizes),
        command=f"python -m benchmarks.effect --data DATA --work WORK --runs RUNS {args.name}",
        dtype="float32",
        device="cpu" if not torch.cuda.is_available() else None,
        progress=lambda what, done, total: print(f"{what}: {done} of {total}", flush=True),
    )
    if results is None:
        return
    published = RESULTS / (args.out or args.name)
    published.mkdir(parents=True, exist_ok=True)
    for file in ("results.json", "report.html", "report.png"):
        shutil.copyfile(folder / file, published / file)


if __name__ == "__main__":
    main()
