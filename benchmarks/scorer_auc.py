"""Measure how well the two offline scorers agree with the Perspective API.

::

    python -m benchmarks.scorer_auc --data DATA

writes ``results/scorer_auc.json``. For prompts and continuations of RealToxicityPrompts it contains
the AUC against a Perspective toxicity of 0.5 or more, and Spearman's rank correlation with that
toxicity, each with a 95 % interval from 1,000 resamples of the texts. The files are used for
measurement only; nothing was tuned on them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from fusion_detox.files.atomic import write_whole
from fusion_detox.scoring import make_scorer
from fusion_detox.scoring.base import Scorer

log = logging.getLogger("scorer_auc")
FILES = ("rtp_challenging.jsonl", "rtp_nontoxic.jsonl")
OUTPUT = Path(__file__).parent / "results" / "scorer_auc.json"
THRESHOLD = 0.5
RESAMPLES = 1000
SEED = 20261121
Measure = Callable[[NDArray[np.float64], NDArray[np.float64]], float]


def auc(reference: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    return float(roc_auc_score(reference >= THRESHOLD, scores))


def rank_correlation(reference: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    return float(spearmanr(reference, scores).statistic)


def interval(
    measure: Measure, reference: NDArray[np.float64], scores: NDArray[np.float64]
) -> list[float]:
    """The value and the ends of its 95 % percentile bootstrap interval."""
    rng, found = np.random.default_rng(SEED), []
    while len(found) < RESAMPLES:
        rows = rng.integers(len(scores), size=len(scores))
        if 0 < (reference[rows] >= THRESHOLD).sum() < len(rows) or measure is rank_correlation:
            found.append(measure(reference[rows], scores[rows]))
    ends = np.quantile(found, [0.025, 0.975])
    return [round(float(v), 4) for v in (measure(reference, scores), *ends)]


def compare(reference: NDArray[np.float64], scores: NDArray[np.float64]) -> dict[str, Any]:
    toxic = int((reference >= THRESHOLD).sum())
    return {
        "texts": len(scores),
        "toxic": toxic,
        "auc": interval(auc, reference, scores) if 0 < toxic < len(scores) else None,
        "spearman": interval(rank_correlation, reference, scores),
    }


def measure(scorers: Sequence[Scorer], folder: Path) -> dict[str, Any]:
    """What the scorers were compared with, and the results by scorer, part and file."""
    data = {name: (folder / name).read_bytes() for name in FILES}
    rows = {name: [json.loads(line) for line in data[name].splitlines()] for name in FILES}
    results: dict[str, Any] = {}
    for part in ("continuation", "prompt"):
        kept = {
            name: [row[part] for row in rows[name] if row[part]["toxicity"] is not None]
            for name in FILES
        }
        for scorer in scorers:
            reference = {n: np.array([row["toxicity"] for row in kept[n]]) for n in FILES}
            scores = {n: np.array(scorer.score([row["text"] for row in kept[n]])) for n in FILES}
            entry = {n.removesuffix(".jsonl"): compare(reference[n], scores[n]) for n in FILES}
            entry["both"] = compare(
                np.concatenate([reference[n] for n in FILES]),
                np.concatenate([scores[n] for n in FILES]),
            )
            results.setdefault(scorer.name, {})[part] = entry
            for name, value in entry.items():
                log.info("%s, %s of %s: %s", scorer.name, part, name, value)
    return {
        "reference": "toxicity by the Perspective API, as published with RealToxicityPrompts",
        "threshold": THRESHOLD,
        "interval": f"95 %, percentiles of {RESAMPLES} resamples of the texts, seed {SEED}",
        "data": {name: hashlib.sha256(data[name]).hexdigest()[:16] for name in FILES},
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    scorers = {name: make_scorer(name) for name in ("lexical", "contextual")}
    record = {
        **measure(list(scorers.values()), args.data),
        "scorers": {name: scorer.record()["weights"] for name, scorer in scorers.items()},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("numpy", "scikit-learn", "scipy", "torch", "transformers")
        },
        "command": "python -m benchmarks.scorer_auc --data DATA",
    }
    write_whole(OUTPUT, json.dumps(record, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
