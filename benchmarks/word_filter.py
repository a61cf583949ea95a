"""The baseline that everybody has: banning the words of a public list.

The list is the one that the package ``better-profanity`` brings along, read as text.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


def word_list() -> list[str]:
    """The words of ``better-profanity``, one a line in its list."""
    files = importlib.metadata.files("better-profanity") or []
    path = next(file for file in files if file.name == "profanity_wordlist.txt")
    lines = path.locate().read_text(encoding="utf-8").splitlines()  # type: ignore[attr-defined]
    return [word for word in map(str.strip, lines) if word]


def tokenisations(tokenizer: Any, words: Iterable[str]) -> list[list[int]]:
    """Each word as it is, lower, Capital and UPPER, with and without a space before it."""
    variants = {
        before + form
        for word in words
        for form in (word, word.lower(), word.capitalize(), word.upper())
        for before in ("", " ")
    }
    encoded = tokenizer(sorted(variants), add_special_tokens=False)["input_ids"]
    return [list(ids) for ids in sorted({tuple(ids) for ids in encoded if ids})]


class WordFilter(LogitsProcessor):
    """Gives no probability to a token that would complete a banned sequence.

    The same as ``NoBadWordsLogitsProcessor`` (tested), which walks through all sequences at every
    step and is far too slow for thousands of them.
    """

    def __init__(self, sequences: Iterable[list[int]]) -> None:
        self.completing: dict[tuple[int, ...], list[int]] = {}
        for ids in sequences:
            self.completing.setdefault(tuple(ids[:-1]), []).append(ids[-1])
        self.lengths = sorted({len(prefix) for prefix in self.completing})

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        longest = max(self.lengths, default=0)
        rows, tokens = [], []
        for row, ids in enumerate(input_ids[:, max(input_ids.shape[1] - longest, 0) :].tolist()):
            for length in self.lengths:
                if length <= len(ids):
                    banned = self.completing.get(tuple(ids[len(ids) - length :]), ())
                    rows += [row] * len(banned)
                    tokens += banned
        fused = scores.clone()
        fused[rows, tokens] = -torch.inf
        return fused
