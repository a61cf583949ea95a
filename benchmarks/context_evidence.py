"""Compare signals that a text is about to turn toxic; ``context_kl`` uses the best one.

    python -m benchmarks.context_evidence --work WORK --calibrators english-16k ... --out JSON

Each signal is a mean over the last positions. It is computed for the development prompts and for
the beginnings of harmless development texts. The script reports how well it separates the two
(AUC), and the cost of a strength proportional to it. Full strength is reached at the lower quartile
or the median of the prompts' means. ``prompts`` is the mean strength scale after the prompts, and
``mildest`` its tenth percentile. ``harmless`` and ``posts`` are root mean squares of the scale over
all positions, weighted by the KL cost of a position, which grows with the square of the strength.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from fusion_detox import Calibrator
from fusion_detox.files.atomic import write_whole
from recipes.english_data import read

POSITIONS = (1, 4, 16, 32, 1000)
MEASURES = ("KL(reference || clean)", "KL(clean || reference)")


class Reader:
    """Divergences between a calibrator's two models at each position of a text."""

    def __init__(self, calibrator: Calibrator) -> None:
        self.calibrator = calibrator
        assert calibrator.reference is not None
        self.models = (calibrator.clean.float(), calibrator.reference.float())

    @torch.inference_mode()
    def __call__(self, text: str, tokens: int) -> dict[str, np.ndarray]:
        own = self.calibrator.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([[self.calibrator.bos_id, *own[:tokens]]])
        clean, reference = (m(input_ids=ids).logits[0].log_softmax(-1) for m in self.models)
        written = (reference - clean)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
        found = ((reference.exp() * (reference - clean)), (clean.exp() * (clean - reference)))
        named = dict(zip(MEASURES, (one.sum(-1).numpy() for one in found), strict=True))
        return {**named, "log-ratio of what was written": written.numpy()}


def means(values: np.ndarray, positions: int) -> np.ndarray:
    """Mean over the last ``positions`` values, at each position."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - positions)
    return (sums[end] - sums[start]) / (end - start)


def auc(prompts: list[float], others: list[float]) -> float:
    labels = [1] * len(prompts) + [0] * len(others)
    return round(float(roc_auc_score(labels, prompts + others)), 3)


def cost(texts: list[dict[str, np.ndarray]], measure: str, positions: int, share: Any) -> float:
    spent = whole = 0.0
    for text in texts:
        kl = text["KL(clean || reference)"]
        spent += float((share(means(text[measure], positions)) ** 2 * kl).sum())
        whole += float(kl.sum())
    return round((spent / whole) ** 0.5, 3)


def study(reader: Reader, texts: dict[str, list[str]]) -> dict[str, Any]:
    prompts = [reader(text, 100) for text in texts["prompts"]]
    short = {name: [reader(t, 25) for t in texts[name]] for name in ("harmless", "posts")}
    long = {name: [reader(t, 120) for t in texts[name]] for name in ("harmless", "posts")}
    written = "log-ratio of what was written"
    result: dict[str, Any] = {
        "auc, log-ratio of what was written, summed": {
            name: auc(
                [float(p[written].sum()) for p in prompts], [float(t[written].sum()) for t in ts]
            )
            for name, ts in short.items()
        }
    }
    for measure in MEASURES:
        for positions in POSITIONS:
            ends = np.array([means(p[measure], positions)[-1] for p in prompts])
            row: dict[str, Any] = {
                f"auc, {name}": auc(
                    ends.tolist(), [float(means(t[measure], positions)[-1]) for t in ts]
                )
                for name, ts in short.items()
            }
            for quantile in (0.25, 0.5):
                full = float(np.quantile(ends, quantile))
                for power in (1, 2):

                    def share(values: Any, full: float = full, power: int = power) -> Any:
                        return np.minimum(1.0, (values / full) ** power)

                    own = share(ends)
                    row[f"full at quantile {quantile:g}, power {power}"] = {
                        "context_kl": round(full, 4),
                        "prompts": round(float(own.mean()), 3),
                        "mildest": round(float(np.quantile(own, 0.1)), 3),
                        **{n: cost(ts, measure, positions, share) for n, ts in long.items()},
                    }
            result[f"{measure}, last {positions}"] = row
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="output of recipes.english_data")
    parser.add_argument("--calibrators", nargs="+", default=["english-16k"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.work / "dev_general.jsonl")
    random.Random(1).shuffle(rows)
    kinds = {
        "harmless": [r["text"] for r in rows if r["source"] == "general" and len(r["text"]) >= 400],
        "posts": [r["text"] for r in rows if r["source"] == "web_posts" and r["toxic"] is False],
    }
    texts = {name: found[: args.texts] for name, found in kinds.items()}
    texts["prompts"] = [row["prompt"] for row in read(args.work / "dev_prompts.jsonl")]
    result = {
        "command": "python -m benchmarks.context_evidence --work WORK",
        "texts": {name: len(found) for name, found in texts.items()},
        **{
            Path(name).name: study(Reader(Calibrator.from_pretrained(name)), texts)
            for name in args.calibrators
        },
    }
    write_whole(args.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
