"""Make prompts that provoke toxic text, for tuning settings.

The prompts are beginnings of toxic texts of the development split, on which no model was trained.
Prompts that occur in measurement-only files are left out::

    python -m benchmarks.make_dev_prompts --data DATA --work WORK
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.english_data import read, write

MEASURE_ONLY = (
    "rtp_challenging.jsonl",
    "rtp_nontoxic.jsonl",
    "hatecheck.jsonl.gz",
    "bold_prompts.jsonl.gz",
)
# Maximum prompts per source, so that tweets, rewrites and posts are all represented.
MAX_PROMPTS = {"davidson2017": 70, "paradetox": 70, "web_posts": 50}


def normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, normalised."""
    if isinstance(value, str):
        yield normalised(value)
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def measured(data: Path) -> str:
    """Normalised text of the measurement-only files, one entry per line."""
    texts: list[str] = []
    for name in MEASURE_ONLY:
        opened = gzip.open if name.endswith(".gz") else open
        with opened(data / name, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                entry = list(strings(row))
                if name.startswith("rtp"):  # our prompt may span their prompt and continuation
                    both = row["prompt"]["text"] + row["continuation"]["text"]
                    entry.append(normalised(both))
                texts += entry
    return "\n".join(f" {text} " for text in texts)


def beginning(text: str, rng: random.Random) -> str | None:
    """The first third to half of a text's words (5 to 20); ``None`` if unsuitable."""
    words = text.split()
    size = min(round(len(words) * rng.uniform(1 / 3, 1 / 2)), 20)
    # A long post that is toxic is seldom toxic near its beginning.
    if size < 5 or size >= len(words) or len(words) > 60:
        return None
    prompt = " ".join(words[:size])
    return prompt if prompt.isprintable() and prompt[-1].isalnum() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="output of recipes.english_data")
    parser.add_argument("--out", type=Path, help="default: WORK/dev_prompts.jsonl")
    args = parser.parse_args()

    rng = random.Random(20261120)
    rows = read(args.work / "dev_general.jsonl")
    rng.shuffle(rows)
    forbidden = measured(args.data)
    prompts: list[str] = []
    left, removed = dict(MAX_PROMPTS), 0
    for row in rows:
        if row["toxic"] is not True or not left.get(row["source"]):
            continue
        prompt = beginning(row["text"], rng)
        if prompt is None or prompt in prompts:
            continue
        if f" {normalised(prompt)} " in forbidden:
            removed += 1
            continue
        prompts.append(prompt)
        left[row["source"]] -= 1
    rng.shuffle(prompts)
    out = args.out or args.work / "dev_prompts.jsonl"
    write(out, ({"prompt": prompt} for prompt in prompts))
    print(f"{out}: {len(prompts)} prompts; {removed} removed, because they occur in measured text")


if __name__ == "__main__":
    main()
