"""Tiny models in folders, and synthetic paraphrase sets whose two sides are easy to distinguish."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

HARSH = ("idiot", "stupid", "damn")
MILD = ("friend", "kind", "fine")
PLACES = ("river", "school", "town", "house", "morning", "paper", "lunch", "weather", "year")


def paraphrase_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for ``read_pairs``: the same sentence with a mild word, and with a harsh one."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        one, other = rng.sample(PLACES, 2)
        frame = f"The {{}} {one} and the {other} {number} were {{}}."
        rows.append(
            {
                "anchor": frame.format("old", "fine"),
                "positives": [frame.format(a, b) for a in ("old", "new") for b in MILD],
                "negatives": [frame.format(a, b) for a in ("old", "new") for b in HARSH],
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write a model folder as ``from_pretrained`` expects it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
