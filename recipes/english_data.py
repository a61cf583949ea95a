"""Prepare the training text of the shipped calibrator and of the demo target.

    python -m recipes.english_data --data DATA --out WORK

Reads the public data sets in DATA. By the MD5 of each text, 2 % of every file is held out for tests
and 2 % for development. Texts without a human label are labelled by a classifier, which is trained
here on one half of the human labels. Writes JSON Lines::

    general.jsonl   general text, toxic text included: the reference's training text
    clean.jsonl     the non-toxic part of it: the clean model's training text
    dev_*.jsonl     never used for training; thresholds and defaults are chosen on it
    test_*.jsonl    never used for training or tuning
    labels_b.jsonl  the other half of the human labels, for the scorers, which therefore share
                    no training row with the classifier

The measurement-only files (RealToxicityPrompts, HateCheck, BOLD) are not read, and neither are
texts that continue RealToxicityPrompts prompts.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_union

log = logging.getLogger("english_data")
CLEAN_BELOW, TOXIC_ABOVE = 0.35, 0.75
CHUNK = 240


def read(path: Path) -> list[dict]:
    """Rows of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def rows(path: Path) -> Iterator[dict]:
    """Rows of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def bucket(text: str) -> int:
    """A number in 0..99 that depends only on the text, for splitting."""
    return int(hashlib.md5(text.encode()).hexdigest()[:8], 16) % 100


def tidy(text: str) -> str:
    """Remove HTML escapes, retweet marks, handles and links from a tweet."""
    text = text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    text = re.sub(r"&#\d+;", "", text)
    text = re.sub(r"^(\W*RT @\w+:?\s*)+|\"?@\w+:?\s?|https?://\S+", "", text)
    return text.strip(' !"')


def chunks(text: str) -> list[str]:
    """Split a text at sentence ends into pieces of about ``CHUNK`` characters.

    One toxic sentence in a long text would otherwise be averaged away.
    """
    pieces, current = [], ""
    for sentence in re.split(r"(?<=[.!?\n])\s+", text):
        if current and len(current) + len(sentence) > CHUNK:
            pieces.append(current)
            current = ""
        current += " " + sentence[: 2 * CHUNK]
    return [*pieces, current] if current.strip() else pieces or [text]


class Filter:
    """Logistic regression on TF-IDF features of words and characters, fitted to human labels."""

    def __init__(self) -> None:
        self.features = make_union(
            TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, max_features=60_000),
            TfidfVectorizer(
                analyzer="char_wb",
                ngram_range=(2, 4),
                min_df=5,
                sublinear_tf=True,
                max_features=60_000,
            ),
        )
        self.model = LogisticRegression(C=4.0, max_iter=300)

    def fit(self, texts: list[str], labels: list[int]) -> None:
        self.model.fit(self.features.fit_transform(texts), labels)

    def score(self, texts: list[str]) -> np.ndarray:
        return self.model.predict_proba(self.features.transform(texts))[:, 1]

    def worst_chunk(self, texts: list[str]) -> np.ndarray:
        split = [chunks(text) for text in texts]
        flat = self.score([piece for pieces in split for piece in pieces])
        ends = np.cumsum([len(pieces) for pieces in split])
        return np.array([part.max() for part in np.split(flat, ends[:-1])])


def write(path: Path, items: Iterable[dict]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for item in items:
            out.write(json.dumps(item, ensure_ascii=False) + "\n")
            count += 1
    log.info("%s: %d rows", path, count)
    return count


def labelled(data: Path) -> Iterator[dict]:
    for row in rows(data / "toxicity_labeled.jsonl.gz"):
        toxic = row["label"] in ("hate", "offensive")
        text = tidy(row["text"])
        if len(text) > 10:
            yield {"text": text, "toxic": toxic, "source": row["source"]}
    for row in rows(data / "paradetox.jsonl.gz"):
        yield {"text": row["toxic"], "toxic": True, "source": "paradetox"}
        yield {"text": row["neutral"][0], "toxic": False, "source": "paradetox"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--posts", type=int, default=115_627, help="maximum number of web posts")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(20261120)

    human = list(labelled(args.data))
    half_a = [r for r in human if bucket("half" + r["text"]) < 50]
    half_b = [r for r in human if bucket("half" + r["text"]) >= 50]
    encyclopedia = [r["text"] for r in rows(args.data / "general.jsonl.gz")]
    train = [r for r in half_a if bucket(r["text"]) >= 4]
    plain = [piece for text in encyclopedia[::4] for piece in chunks(text)[:2]]
    judge = Filter()
    judge.fit(
        [r["text"] for r in train] + plain, [int(r["toxic"]) for r in train] + [0] * len(plain)
    )
    held = [r for r in human if bucket(r["text"]) < 4]
    auc = roc_auc_score([r["toxic"] for r in held], judge.score([r["text"] for r in held]))
    log.info("filter: %d training rows, AUC %.3f on %d held-out rows", len(train), auc, len(held))

    documents: list[dict] = [
        {"text": r["text"], "toxic": r["toxic"], "source": r["source"]} for r in human
    ]
    documents += [{"text": t, "toxic": False, "source": "general"} for t in encyclopedia]
    posts = [
        {"text": r["text"].strip(), "source": "web_posts"}
        for r in rows(args.data / "web_posts.jsonl.gz")
        if 40 <= len(r["text"]) <= 1500
    ]
    rng.shuffle(posts)
    posts = posts[: args.posts]
    for start in range(0, len(posts), 4000):
        part = posts[start : start + 4000]
        for post, score in zip(part, judge.worst_chunk([p["text"] for p in part]), strict=False):
            post["score"] = round(float(score), 3)
            post["toxic"] = (
                bool(score > TOXIC_ABOVE) if not CLEAN_BELOW < score < TOXIC_ABOVE else None
            )
    documents += posts
    rng.shuffle(documents)
    toxic = sum(d["toxic"] is True for d in documents)
    log.info(
        "%d documents, %d toxic, %d undecided",
        len(documents),
        toxic,
        sum(d["toxic"] is None for d in documents),
    )

    parts = {"test": range(0, 2), "dev": range(2, 4), "train": range(4, 100)}
    for name, span in parts.items():
        rows_ = [d for d in documents if bucket(d["text"]) in span]
        prefix = "" if name == "train" else f"{name}_"
        write(args.out / f"{prefix}general.jsonl", rows_)
        write(args.out / f"{prefix}clean.jsonl", (d for d in rows_ if d["toxic"] is False))
    write(args.out / "labels_b.jsonl", (r for r in half_b if bucket(r["text"]) >= 4))
    (args.out / "filter.json").write_text(
        json.dumps({"held_out_auc": round(float(auc), 4), "training_rows": len(train)})
    )


if __name__ == "__main__":
    main()
