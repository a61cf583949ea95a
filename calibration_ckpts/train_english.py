r"""Train the shipped English calibrator with ``fusion-detox train-calibrator``.

    python calibration_ckpts/prepare_english_data.py --data DATA --out WORK
    python calibration_ckpts/train_english.py --data WORK --out calibration_ckpts/english-16k

``--tokenizer TARGET`` trains the same recipe with another vocabulary, for comparison. The shipped
calibrator has a contrastive stage on top of that::

    python calibration_ckpts/prepare_english_pairs.py --data DATA --work WORK
    python calibration_ckpts/train_english.py --data WORK --calibrator LM --out ENGLISH

where LM is what the first command wrote. Its settings are then chosen on development prompts, see
``benchmarks/LOG.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

DATA = [
    ("web_posts (reddit-top-2.5-million)", "PDDL-1.0"),
    ("Schema-Guided Dialogue", "CC-BY-SA-4.0"),
    ("Topical-Chat", "CDLA-Sharing-1.0"),
    ("WikiText-2 valid+test", "CC-BY-SA-3.0"),
    ("ParaDetox", "CC0-1.0"),
    ("Davidson et al. 2017", "MIT"),
    ("SafeNLP (ToxiGen, Implicit Hate)", "MIT"),
]
DOMAINS = {"web_posts": "posts", "general": "general"}
PAIRS = (
    "continuations of training prompts by the reference itself, graded by a TF-IDF classifier and "
    "a network on sentence embeddings, both trained on the half of the human labels that the "
    "scorers have not seen (calibration_ckpts/prepare_english_pairs.py)"
)
RECIPE = {
    "precision": "bfloat16",
    "base-steps": 1500,
    "fork-steps": 600,
    "contrast-share": 0.35,
    "domain-column": "domain",
    "clean-where": "toxic=false",
}


CONTRAST = {
    "precision": "bfloat16",
    "objective": "likelihood-ratio",
    "objective-steps": 900,
    "anchors": 10,
    "positives": 8,
    "negatives": 8,
    "tilt": 12,
    "held-out": 0.05,
    "evaluate-every": 100,
    "save-every": 100,
}
STEADY_POSTS = 0.17
"""Share of the clean posts on which the contrastive stage is to change nothing."""


def write_corpus(data: Path, most_posts: int) -> Path:
    """What language modelling learns from."""
    with (data / "general.jsonl").open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["toxic"] is not None]
    posts = [r for r in rows if r["source"] == "web_posts" and not r["toxic"]]
    kept = [r for r in rows if r["source"] != "web_posts" or r["toxic"]]
    rng = random.Random(11)
    kept += rng.sample(posts, min(most_posts, len(posts)))
    rng.shuffle(kept)
    corpus = data / "calibrator.jsonl"
    with corpus.open("w", encoding="utf-8") as out:
        for row in kept:
            domain = DOMAINS.get(row["source"], "short")
            line = {"text": row["text"], "toxic": row["toxic"], "domain": domain}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    return corpus


def write_steady(data: Path) -> Path:
    """Clean text on which the contrastive stage keeps the model as it is.

    Dialogues, encyclopedia and some posts, but none of the short labelled texts, which look like
    the beginnings on which it is to act.
    """
    rng, texts = random.Random(12), []
    with (data / "clean.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            posts = row["source"] == "web_posts"
            if row["source"] == "general" or (posts and rng.random() < STEADY_POSTS):
                texts.append(row["text"])
    rng.shuffle(texts)
    steady = data / "steady.jsonl"
    with steady.open("w", encoding="utf-8") as out:
        for text in texts:
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return steady


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--calibrator", help="goes on from this one with the contrastive stage")
    parser.add_argument("--posts", type=int, default=45_000, help="clean posts to use")
    args, more = parser.parse_known_args()

    notes = args.data / "notes.json"
    filter_facts = json.loads((args.data / "filter.json").read_text())
    notes.write_text(
        json.dumps(
            {
                "language": "en",
                "license": "apache-2.0",
                "data": [{"name": name, "license": licence} for name, licence in DATA],
                "clean_text": "human labels where there are some, else a TF-IDF classifier trained "
                "on half of the human labels; "
                f"AUC {filter_facts['held_out_auc']} on held-out labels",
            }
        )
    )
    options = CONTRAST if args.calibrator else RECIPE
    command = ["train-calibrator", str(args.out), *(f"--{k}={v}" for k, v in options.items())]
    if args.calibrator:
        notes.write_text(json.dumps({"pairs": PAIRS}))
        command += [f"--calibrator={args.calibrator}", f"--pairs={args.data / 'pairs.jsonl'}"]
        command.append(f"--clean={write_steady(args.data)}")
    else:
        command.append(f"--general={write_corpus(args.data, args.posts)}")
    if args.tokenizer:
        command.append(f"--tokenizer={args.tokenizer}")
    command += [f"--notes={notes}", *more]
    return subprocess.call([sys.executable, "-m", "fusion_detox", *command])


if __name__ == "__main__":
    sys.exit(main())
