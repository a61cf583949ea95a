"""Prepare the paraphrase sets for the contrastive stage of the English calibrator.

    python -m recipes.english_data --data DATA --out WORK
    python -m recipes.english_pairs --data DATA --work WORK --calibrator LM

The reference of LM, a calibrator without a contrastive stage, continues the beginnings of toxic and
harmless training texts eight times each. Two judges (``english_judges``) grade the continuations.
``WORK/pairs.jsonl`` contains each beginning whose grades differ, with its continuations and grades.
"Negatives" are the continuations in the upper half of a beginning's range of grades. The
likelihood-ratio objective, for which the sets are made, reads only the grades.

The measurement-only files and the development and test splits are not used.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import make_dev_prompts
from fusion_detox import Calibrator
from recipes import english_data as english
from recipes.english_judges import Judges

log = logging.getLogger("english_pairs")
CAPS = {
    True: {
        "davidson2017": 1800, "paradetox": 1200, "web_posts": 1000, "safenlp_toxiGen": 700,
        "safenlp_implicitHate": 700,
    },
    False: {"web_posts": 700, "general": 400, "safenlp_toxiGen": 300, "davidson2017": 200},
}  # fmt: skip
SAMPLES, NEW_TOKENS, BATCH = 8, 20, 24
MIN_TEXTS, MIN_RANGE = 4, 0.1


def beginnings(work: Path) -> list[list[dict[str, Any]]]:
    """Prompts in batches of similar length; the batches are in random order."""
    rows = english.read(work / "general.jsonl")
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


def continue_batches(name: str, batches: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
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
    """A row in the format of ``read_pairs``, or ``None`` if the grades hardly differ."""
    distinct: dict[str, tuple[str, float]] = {}
    for text, grade in zip(row["continuations"], grades, strict=True):
        if text.split():
            distinct.setdefault(" ".join(text.split()), (text, round(grade, 3)))
    if len(distinct) < MIN_TEXTS:
        return None
    low, *_, high = sorted(grade for _, grade in distinct.values())
    if high - low < MIN_RANGE:
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
    parser.add_argument("--work", type=Path, required=True, help="output of recipes.english_data")
    parser.add_argument(
        "--calibrator", default="english-16k", help="the calibrator whose reference continues"
    )
    parser.add_argument("--prompts", type=int, default=4225)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    raw = args.work / "continuations.jsonl"
    if not raw.exists():  # takes an hour on one core
        batches = beginnings(args.work)[: -(-args.prompts // BATCH)]
        unfinished = raw.with_suffix(".tmp")
        with unfinished.open("w", encoding="utf-8") as out:
            for row in continue_batches(args.calibrator, batches):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(unfinished, raw)
    rows = english.read(raw)[: args.prompts]
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
