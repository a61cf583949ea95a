"""Prepare what a contrastive stage of the English calibrator learns from: negatives of its own.

    python calibration_ckpts/prepare_english_data.py --data DATA --out WORK
    python calibration_ckpts/prepare_english_pairs.py --data DATA --work WORK

Beginnings of toxic and of harmless training texts are each continued eight times by the reference
of a calibrator without such a stage, and two judges (``english_judges``) grade the continuations.
``WORK/pairs.jsonl`` holds the beginnings of which the grades differ, each with its continuations
and grades. "Negatives" are those in the upper half of a beginning's range of grades; the likelihood
ratio, for which they are meant, reads the grades only.

Nothing here reads the measure-only files, and no text of the development or test split is used.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "calibration_ckpts"), str(ROOT / "benchmarks")]
import make_dev_prompts  # noqa: E402
import prepare_english_data as english  # noqa: E402
import train_scorers  # noqa: E402
from english_judges import Judges  # noqa: E402

from fusion_detox import Calibrator  # noqa: E402

log = logging.getLogger("prepare_english_pairs")
CAPS = {
    True: {
        "davidson2017": 1800, "paradetox": 1200, "web_posts": 1000, "safenlp_toxiGen": 700,
        "safenlp_implicitHate": 700,
    },
    False: {"web_posts": 700, "general": 400, "safenlp_toxiGen": 300, "davidson2017": 200},
}  # fmt: skip
SAMPLES, NEW_TOKENS, BATCH = 8, 20, 24
LEAST_TEXTS, LEAST_RANGE = 4, 0.1


def beginnings(work: Path) -> list[list[dict[str, Any]]]:
    """Prompts in batches of similar lengths, in random order."""
    rows = train_scorers.read(work / "general.jsonl")
    rng = random.Random(7)
    rng.shuffle(rows)
    count: dict[tuple[bool, str], int] = {}
    prompts = []
    for row in rows:
        if row["toxic"] is None:
            continue
        kind = (row["toxic"], row["source"])
        if count.get(kind, 0) >= CAPS[row["toxic"]].get(row["source"], 0):
            continue
        prompt = make_dev_prompts.beginning(row["text"], rng)
        if prompt:
            prompts.append({"prompt": prompt, "toxic": row["toxic"], "source": row["source"]})
            count[kind] = count.get(kind, 0) + 1
    prompts.sort(key=lambda row: len(row["prompt"]))
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    rng.shuffle(batches)
    return batches


def continued(name: str, batches: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    calibrator = Calibrator.from_pretrained(name)
    tokenizer, model, bos = calibrator.tokenizer, calibrator.reference, calibrator.bos_id
    assert model is not None
    torch.manual_seed(5)
    for number, batch in enumerate(batches):
        texts = [row["prompt"] for row in batch]
        ids = [[bos, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
        width = max(map(len, ids))
        padded = torch.tensor([[bos] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        with torch.inference_mode():
            written = model.generate(
                input_ids=padded, attention_mask=mask, do_sample=True, top_p=0.9, top_k=0,
                max_new_tokens=NEW_TOKENS, num_return_sequences=SAMPLES, pad_token_id=bos,
            )  # fmt: skip
        ends = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        for at, row in enumerate(batch):
            yield {**row, "continuations": ends[at * SAMPLES : (at + 1) * SAMPLES]}
        if number % 20 == 0:
            log.info("continued %d of %d batches", number + 1, len(batches))


def as_set(row: dict[str, Any], grades: list[float], writer: str) -> dict[str, Any] | None:
    """A row of the library's own format, or nothing where the grades hardly differ."""
    distinct: dict[str, tuple[str, float]] = {}
    for text, grade in zip(row["continuations"], grades, strict=True):
        if text.split():
            distinct.setdefault(" ".join(text.split()), (text, round(grade, 3)))
    if len(distinct) < LEAST_TEXTS:
        return None
    low, *_, high = sorted(grade for _, grade in distinct.values())
    if high - low < LEAST_RANGE:
        return None
    sides = {
        "positives": [one for one in distinct.values() if one[1] < (low + high) / 2],
        "negatives": [one for one in distinct.values() if one[1] >= (low + high) / 2],
    }
    return {
        "anchor": row["prompt"],
        "prompt": row["prompt"],
        **{name: [text for text, _ in side] for name, side in sides.items()},
        "provenance": {
            "writer": writer,
            "source": row["source"],
            "scores": {
                name: [{"toxicity": grade} for _, grade in side] for name, side in sides.items()
            },
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="output of prepare_english_data")
    parser.add_argument("--calibrator", default="english-16k", help="whose reference continues")
    parser.add_argument("--prompts", type=int, default=4225)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    raw = args.work / "continuations.jsonl"
    if not raw.exists():  # an hour on one core
        batches = beginnings(args.work)[: -(-args.prompts // BATCH)]
        unfinished = raw.with_suffix(".tmp")
        with unfinished.open("w", encoding="utf-8") as out:
            for row in continued(args.calibrator, batches):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(unfinished, raw)
    rows = train_scorers.read(raw)[: args.prompts]
    judges = Judges(args.data, args.work)
    found = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        grades = judges([text for row in part for text in row["continuations"]])
        for row, own in zip(part, grades.reshape(len(part), SAMPLES).tolist(), strict=True):
            one = as_set(row, own, args.calibrator)
            if one is not None:
                found.append(one)
    log.info("%d beginnings, %d with grades that differ", len(rows), len(found))
    english.write(args.work / "pairs.jsonl", found)


if __name__ == "__main__":
    main()
