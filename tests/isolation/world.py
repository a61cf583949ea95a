"""Rows with known results, and a processor whose past must not change them.

The oracle is a processor that has seen nothing but the one row.
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
    """Return a processor without a past: copies share the map but no memo (tested elsewhere)."""
    other = copy.copy(processor)
    other._sessions = {}
    other._context = copy.copy(processor._context)
    return other


def scores_for(rows, width):
    """Return scores that depend only on each row's ids, as a model's do."""
    digests = [hashlib.sha256(repr(row).encode()).digest() for row in rows]
    seeds = [int.from_bytes(digest[:6], "big") for digest in digests]
    return torch.stack(
        [2 * torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


class World:
    """A processor with a past, and each row's expected result, which must not depend on it."""

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
        """Return ids as ``generate`` passes them: left padded, or all of equal length."""
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
    """Raised by tests to make a call fail."""


def inner_parts(processor):
    """Yield where a call can be interrupted: object, method, and whether its work is done first."""
    session = next(iter(processor._sessions.values()), None)
    yield processor.vocabulary, "gather", False
    yield processor._context, "read", True
    yield processor._context, "_advance", False
    if session is not None:
        for done in (False, True):
            yield session._decoder, "logits", done
            yield session._decoder, "resize", done
            yield session._decoder, "copy", done
        yield session, "_values", True
        yield session._planner, "plan", True
        yield session._planner, "hold", False


def interrupt(processor, number, ids, scores):
    """Make a call in which one part fails; return whether that part was reached."""
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
