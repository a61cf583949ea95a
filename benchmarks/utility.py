"""What a target can still do under fusion: accuracy on LAMBADA, PIQA, ARC, OpenBookQA and others.

    python -m benchmarks.utility --target MODEL --data DATA [--limit 100]

Each task's choices are ranked by their log-probability after the question (per byte for PIQA, ARC
and OpenBookQA); LAMBADA counts a last word as correct if every token of it is the most probable
one. The target runs once; fusion changes the scores of the same positions. ``utility.jsonl.gz`` is
for measuring only, so nothing was tuned on it.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_detox import FusionLogitsProcessor
from fusion_detox.files.atomic import write_whole
from fusion_detox.files.models import load_target

RESULTS = Path(__file__).parent / "results" / "utility.json"
PER_BYTE = {"piqa", "arc_easy", "arc_challenge", "openbook_qa"}
LAMBADA = "lambada_openai"
ROWS = 64


class Item(NamedTuple):
    """A question with its continuations; ``gold`` is the number of the right one."""

    task: str
    options: list[tuple[str, str]]
    gold: int


def read_items(path: Path, limit: int) -> Iterator[Item]:
    """The first ``limit`` items of each task."""
    seen: dict[str, int] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            task = row["task"]
            seen[task] = seen.get(task, 0) + 1
            if seen[task] > limit:
                continue
            if task == LAMBADA:
                yield Item(task, [(row["context"], " " + row["continuation"].strip())], 0)
            elif "context_options" in row:
                end = " " + row["continuation"].strip()
                yield Item(task, [(text, end) for text in row["context_options"]], row["gold"])
            else:
                query = row["query"] + ("\nAnswer:" if task in PER_BYTE else "")
                yield Item(task, [(query, " " + one) for one in row["choices"]], row["gold"])


@torch.inference_mode()
def values(
    model: Any, tokenizer: Any, processor: Any, before: str, text: str
) -> list[tuple[float, bool]]:
    """Summed log-prob of ``text`` and whether greedy decoding writes it: alone, then fused."""
    start = tokenizer(before)["input_ids"][-900:]
    end = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*start, *end]])
    scores = model(input_ids=ids).logits[0, len(start) - 1 : -1].float()
    rows = [[*start, *end[:done]] for done in range(len(end))]
    parts = [
        processor.fuse_rows(rows[first : first + ROWS], scores[first : first + ROWS])
        for first in range(0, len(rows), ROWS)
    ]
    written = torch.tensor(end)
    return [_value(scores, written), _value(torch.cat(parts), written)]


def _value(scores: Tensor, written: Tensor) -> tuple[float, bool]:
    log_probs = scores.log_softmax(-1)
    total = float(log_probs.gather(1, written[:, None]).sum())
    return total, bool((log_probs.argmax(-1) == written).all())


def correct(item: Item, found: Sequence[tuple[float, bool]]) -> bool:
    """Whether the task's rule picks the right continuation."""
    if item.task == LAMBADA:
        return found[0][1]
    sizes = [len(text.encode()) if item.task in PER_BYTE else 1 for _, text in item.options]
    ranks = [value / size for (value, _), size in zip(found, sizes, strict=True)]
    return ranks.index(max(ranks)) == item.gold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="model: a folder or packaged:NAME")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--limit", type=int, default=100, help="items per task")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_target(args.target, dtype=torch.float32)
    processor = FusionLogitsProcessor(args.calibrator, tokenizer)
    counts: dict[str, dict[str, int]] = {}
    for item in read_items(args.data / "utility.jsonl.gz", args.limit):
        pairs = [values(model, tokenizer, processor, *option) for option in item.options]
        alone, fused = (correct(item, [pair[side] for pair in pairs]) for side in (0, 1))
        count = counts.setdefault(item.task, dict.fromkeys(("items", "alone", "fused", "moved"), 0))
        for name, value in (("items", 1), ("alone", alone), ("fused", fused)):
            count[name] += int(value)
        count["moved"] += alone != fused
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    results[Path(args.target).name] = {
        "calibrator": args.calibrator,
        "settings": processor.config.to_dict(),
        "tasks": counts,
    }
    write_whole(args.output, (json.dumps(results, indent=1) + "\n").encode())
    for task, count in counts.items():
        print(f"{task:16} {count}")


if __name__ == "__main__":
    main()
