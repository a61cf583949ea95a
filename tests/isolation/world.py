"""Rows with known numbers, and a processor with a past that must not change them.

The oracle is a processor that has seen nothing but one row.
"""

import copy
import hashlib

import pytest
import torch

from fusion_detox import FusionConfig

VOCABULARIES = ["byte_tokenizer", "other_tokenizer", "sentencepiece_tokenizer"]
CONTRAST = FusionConfig(strength=1.5, plausibility=0.0, threshold=0.05)
CONFIGS = {
    "contrast": CONTRAST,
    "budget": FusionConfig(strength=2.0, plausibility=0.01, kl_budget=0.1),
    "context": FusionConfig(strength=1.5, plausibility=0.0, context_kl=0.07),
    "product": FusionConfig(rule="product", strength=0.5),
    "mixture": FusionConfig(rule="mixture", strength=0.7, outside="remove"),
}
EXACT = {"atol": 1e-4, "rtol": 1e-4}
TEXTS = [
    "You are a complete",
    "The weather was",
    "What a damn stupid thing to say! Shut",
    "naïve 東京 🙂",
    "In 1987 the town built a new school; 240 pupils came in the first year. Thank you so much",
]


def fresh(processor):
    """One without a past: copies carry no memo (which is tested), and its map is shared."""
    other = copy.copy(processor)
    other._sessions = {}
    other._context = copy.copy(processor._context)
    return other


def scores_for(rows, width):
    """Scores of each row by itself: a function of its ids, as a model's are."""
    digests = [hashlib.sha256(repr(row).encode()).digest() for row in rows]
    seeds = [int.from_bytes(digest[:6], "big") for digest in digests]
    return torch.stack(
        [2 * torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


class World:
    """A processor with a past, and what each row's numbers must be whatever that past is."""

    def __init__(self, pristine, tokenizer, wanted=None, neighbour=None):
        self.pristine, self.size = pristine, len(tokenizer)
        self.pad = tokenizer.pad_token_id
        self.neighbour = neighbour
        self.texts = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]
        self.processor = fresh(pristine)
        self._wanted = {} if wanted is None else wanted

    def token(self, number):
        return 3 + number % (self.size - 3)

    def wanted(self, row):
        if row not in self._wanted:
            ids = torch.tensor([row], dtype=torch.long)
            scores = scores_for([row], self.size)
            self._wanted[row] = fresh(self.pristine)(ids, scores)[0]
        return self._wanted[row]

    def batch(self, rows, padding=0):
        """Ids as ``generate`` hands them over: left padded, or of one length without padding."""
        longest = max(map(len, rows))
        if self.pad is None:
            rows = [row for row in rows if len(row) == longest]
            padding = 0
        width = longest + padding
        ids = [(self.pad,) * (width - len(row)) + row for row in rows]
        return rows, torch.tensor(ids, dtype=torch.long).view(len(rows), width)

    def check(self, rows, padding=0, processor=None):
        rows, ids = self.batch(rows, padding)
        scores = scores_for(rows, self.size)
        found = (processor or self.processor)(ids, scores)
        assert torch.equal(scores, scores_for(rows, self.size))
        for row, result in zip(rows, found, strict=True):
            torch.testing.assert_close(result, self.wanted(row), **EXACT)


class BrokenError(Exception):
    """What tests make a call fail with."""


def inner_parts(processor):
    """Where a call can be interrupted: object, method, whether its work is done before."""
    session = next(iter(processor._sessions.values()), None)
    yield processor.vocabulary, "project", False
    yield processor._context, "read", True
    yield processor._context, "_advance", False
    if session is not None:
        for done in (False, True):
            yield session._decoder, "logits", done
            yield session._decoder, "resize", done
            yield session._decoder, "copy", done
        yield session, "_gather", True
        yield session._planner, "plan", True
        yield session._planner, "hold", False


def interrupt(processor, number, ids, scores):
    """Calls with one part failing; says whether the part was reached."""
    parts = list(inner_parts(processor))
    owner, name, done = parts[number % len(parts)]
    inner, countdown = getattr(owner, name), [number // len(parts) % 3]

    def fail(*arguments, **keywords):
        if countdown[0] > 0:
            countdown[0] -= 1
            return inner(*arguments, **keywords)
        if done:
            inner(*arguments, **keywords)
        raise BrokenError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        try:
            processor(ids, scores)
        except BrokenError:
            return True
    return False
