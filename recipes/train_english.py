"""Train the shipped English calibrator with ``fusion-detox train-calibrator``.

    python -m recipes.english_data --data DATA --out WORK
    python -m recipes.train_english --data WORK --out LM
    python -m recipes.english_pairs --data DATA --work WORK --calibrator LM
    python -m recipes.train_english --data WORK --calibrator LM --out calibration_ckpts/english-16k

The second command trains by language modelling alone, the last one adds the contrastive stage. The
fusion settings were then chosen on development prompts; see ``benchmarks/LOG.md``. ``--tokenizer
TARGET`` trains the first stage with another vocabulary, for comparison.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from recipes.english_data import read, write

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
    "scorers have not seen (recipes/english_pairs.py)"
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
KL_ANCHOR_POSTS = 0.17
"""Fraction of the clean posts on which the contrastive stage should change nothing."""


def write_corpus(data: Path, max_posts: int) -> Path:
    """Write the training text of the language-modelling stages."""
    rows = [row for row in read(data / "general.jsonl") if row["toxic"] is not None]
    posts = [r for r in rows if r["source"] == "web_posts" and not r["toxic"]]
    kept = [r for r in rows if r["source"] != "web_posts" or r["toxic"]]
    rng = random.Random(11)
    kept += rng.sample(posts, min(max_posts, len(posts)))
    rng.shuffle(kept)
    corpus = data / "calibrator.jsonl"
    for row in kept:
        row["domain"] = DOMAINS.get(row["source"], "short")
    write(corpus, ({name: row[name] for name in ("text", "toxic", "domain")} for row in kept))
    return corpus


def write_kl_anchor_text(data: Path) -> Path:
    """Write the clean text on which the contrastive stage should not change the model.

    It consists of dialogues, encyclopedia text and some posts. The short labelled texts are left
    out, because they look like the beginnings on which the stage should act.
    """
    rng, texts = random.Random(12), []
    for row in read(data / "clean.jsonl"):
        posts = row["source"] == "web_posts"
        if row["source"] == "general" or (posts and rng.random() < KL_ANCHOR_POSTS):
            texts.append(row["text"])
    rng.shuffle(texts)
    path = data / "kl_anchor_text.jsonl"
    write(path, ({"text": text} for text in texts))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument(
        "--calibrator", help="continue from this calibrator with the contrastive stage"
    )
    parser.add_argument("--posts", type=int, default=45_000, help="maximum number of clean posts")
    args, more = parser.parse_known_args()

    notes = args.data / "notes.json"
    filter_facts = json.loads((args.data / "filter.json").read_text())
    notes.write_text(
        json.dumps(
            {
                "language": "en",
                "license": "apache-2.0",
                "data": [{"name": name, "license": licence} for name, licence in DATA],
                "clean_text": "human labels if there are any, otherwise a TF-IDF classifier "
                "trained on half of the human labels; "
                f"AUC {filter_facts['held_out_auc']} on held-out labels",
            }
        )
    )
    options = CONTRAST if args.calibrator else RECIPE
    command = ["train-calibrator", str(args.out), *(f"--{k}={v}" for k, v in options.items())]
    if args.calibrator:
        notes.write_text(json.dumps({"pairs": PAIRS}))
        command += [f"--calibrator={args.calibrator}", f"--pairs={args.data / 'pairs.jsonl'}"]
        command.append(f"--clean={write_kl_anchor_text(args.data)}")
    else:
        command.append(f"--general={write_corpus(args.data, args.posts)}")
    if args.tokenizer:
        command.append(f"--tokenizer={args.tokenizer}")
    command += [f"--notes={notes}", *more]
    return subprocess.call([sys.executable, "-m", "fusion_detox", *command])


if __name__ == "__main__":
    sys.exit(main())
