"""Turns paraphrase sets into padded batches of whole anchors with exact label masks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion_detox.errors import DataError
from fusion_detox.training.data.blocks import Blocks, tokenize
from fusion_detox.training.data.corpus import Document
from fusion_detox.training.data.pairs import ParaphraseSet, fold
from fusion_detox.training.loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Row = tuple[list[int], int]
"""Token ids including BOS, and the number of leading tokens (BOS, prompt) that do not count."""


@dataclasses.dataclass(frozen=True)
class ContrastText:
    """Paraphrase sets, and text on which the model should not change; each with a held-out part."""

    sets: list[ParaphraseSet]
    held_sets: list[ParaphraseSet]
    kl_anchor_text: list[Document]
    held_kl_anchor_text: list[Document]


@dataclasses.dataclass(frozen=True)
class EncodedSet:
    """A paraphrase set as token ids; each wording follows BOS and the set's prompt.

    ``grades`` are the toxicities of the positives, then of the negatives, in 0..1.
    """

    positives: tuple[Row, ...]
    negatives: tuple[Row, ...]
    grades: tuple[float, ...]


def check_sets(sets: Sequence[ParaphraseSet]) -> None:
    """Check that the objectives can use these sets.

    Raises:
        DataError: There is no set, an anchor has no positive, or a positive equals a negative.
    """
    if not sets:
        raise DataError("there is no paraphrase set to learn from: give a file that contains some")
    for one in sets:
        if not one.positives:
            raise DataError(
                f"the anchor {_short(one.anchor)} has no positive, so its negatives have no "
                "prototype to be compared with: add a non-toxic wording, or remove the anchor"
            )
        both = {fold(text) for text in one.positives} & {fold(text) for text in one.negatives}
        if both:
            raise DataError(
                f"the anchor {_short(one.anchor)} has {_short(min(both))} as both a positive and a "
                "negative: remove it from one of them"
            )


def encode_sets(
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[ParaphraseSet],
    *,
    bos_id: int,
    context_length: int,
) -> list[EncodedSet]:
    """Tokenise all wordings as when decoding, BOS first, and truncate those that are too long.

    Prompt tokens do not count; a token that straddles the end of the prompt counts. A row that is
    too long loses tokens from the start of its prompt (equally many for all wordings of a set) and
    from the end of the wording. The wording keeps at least half of the context. A warning says how
    many wordings were truncated.

    Raises:
        DataError: A wording has no token after its prompt.
    """
    documents = [
        Document(text, one.prompt) for one in sets for text in (*one.positives, *one.negatives)
    ]
    rows = iter(tokenize(tokenizer, documents))
    encoded, cut, body = [], 0, context_length - 1
    for one in sets:
        own = [next(rows) for _ in (*one.positives, *one.negatives)]
        longest = max(len(ids) - skipped for ids, skipped in own)
        room = body - min(longest, -(-body // 2))
        kept = []
        for (ids, skipped), text in zip(own, (*one.positives, *one.negatives), strict=True):
            if skipped == len(ids):
                raise DataError(f"{_short(text)} has no token after its prompt: remove it")
            removed = max(skipped - room, 0)
            short = [bos_id, *ids[removed : removed + body]]
            cut += len(short) <= len(ids)
            kept.append((short, 1 + skipped - removed))
        count = len(one.positives)
        encoded.append(EncodedSet(tuple(kept[:count]), tuple(kept[count:]), grades(one)))
    if cut:
        logger.warning(
            "%d of %d wordings were truncated to the context of %d tokens",
            cut,
            len(documents),
            context_length,
        )
    return encoded


def grades(one: ParaphraseSet) -> tuple[float, ...]:
    """Toxicity of each positive, then of each negative, in 0..1.

    Taken from ``provenance["scores"]``, which ``make-negatives`` writes, if it has a score for
    every wording; otherwise 0 for positives and 1 for negatives.
    """
    scores = one.provenance.get("scores")
    sides = (("positives", one.positives), ("negatives", one.negatives))
    found: list[float] = []
    for name, wordings in sides:
        own = scores.get(name) if isinstance(scores, Mapping) else None
        for score in own if isinstance(own, list) and len(own) == len(wordings) else ():
            value = score.get("toxicity") if isinstance(score, Mapping) else None
            if isinstance(value, (int, float)) and 0 <= value <= 1:
                found.append(float(value))
    if len(found) == len(one.positives) + len(one.negatives):
        return tuple(found)
    return (0.0,) * len(one.positives) + (1.0,) * len(one.negatives)


def grades_digest(sets: Sequence[ParaphraseSet]) -> str:
    """Hash of all grades, which the keys of the sets do not include."""
    found = [(one.key, grades(one)) for one in sets]
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One anchor of a batch: the wordings drawn for it and, optionally, a row of general text."""

    rows: tuple[Row, ...]
    positive: tuple[bool, ...]
    grades: tuple[float, ...]
    general: dict[str, Tensor] | None = None


class AnchorDraws(Dataset[Drawn]):
    """``count`` anchors, each used about equally often, with wordings drawn anew each time.

    A draw depends only on the seed and its index, so a resumed or distributed run draws the same.

    Args:
        sets: The anchors.
        count: Length of the data set.
        positives: |P|, the number of positives drawn per anchor; all if it has fewer.
        negatives: |N|, likewise.
        general: Blocks of general text; one accompanies each anchor.
        seed: Seed of the order and the draws.
    """

    def __init__(
        self,
        sets: Sequence[EncodedSet],
        count: int,
        *,
        positives: int,
        negatives: int,
        general: Blocks | None = None,
        seed: int,
    ) -> None:
        self._sets, self._general, self._seed = sets, general, seed
        self._positives, self._negatives = positives, negatives
        rng = random.Random(f"order {seed}")
        self._order = list(cycle(rng, len(sets), count))
        self._blocks = [] if general is None else list(cycle(rng, len(general), count))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Drawn:
        one = self._sets[self._order[index]]
        rng = random.Random(f"draw {self._seed} {index}")
        count, others = len(one.positives), len(one.negatives)
        positives = rng.sample(range(count), min(self._positives, count))
        negatives = rng.sample(range(count, count + others), min(self._negatives, others))
        general = None if self._general is None else self._general[self._blocks[index]]
        kinds = (True,) * len(positives) + (False,) * len(negatives)
        drawn, rows = (*positives, *negatives), (*one.positives, *one.negatives)
        return Drawn(
            tuple(rows[at] for at in drawn), kinds, tuple(one.grades[at] for at in drawn), general
        )


def collate(anchors: Sequence[Drawn], pad_id: int = 0) -> dict[str, Any]:
    """Collate whole anchors into a batch.

    Args:
        anchors: Any number of anchors.
        pad_id: Padding on the right. It is masked in attention and labels, so any id will do.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``: ``(rows, length)``, with ``IGNORED`` as the
        label of BOS, prompts and padding. ``group``, ``positive``, ``toxicity``: ``(rows,)``. If
        the anchors have general text, also ``general_input_ids``, ``general_attention_mask`` and
        ``general_labels``: ``(anchors, general length)``.
    """
    rows = [row for anchor in anchors for row in anchor.rows]
    length = max(len(ids) for ids, _ in rows)
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for number, (own, skipped) in enumerate(rows):
        ids[number, : len(own)] = own
        mask[number, : len(own)] = 1
        labels[number, skipped : len(own)] = own[skipped:]
    batch = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
        "group": torch.tensor([i for i, anchor in enumerate(anchors) for _ in anchor.rows]),
        "positive": torch.tensor([kind for anchor in anchors for kind in anchor.positive]),
        "toxicity": torch.tensor([grade for anchor in anchors for grade in anchor.grades]),
    }
    general = [anchor.general for anchor in anchors if anchor.general is not None]
    for name in general[0] if general else ():
        batch[f"general_{name}"] = torch.stack([row[name] for row in general])
    return batch


def whole(one: EncodedSet) -> Drawn:
    """All wordings of a set, for evaluation."""
    kinds = (True,) * len(one.positives) + (False,) * len(one.negatives)
    return Drawn((*one.positives, *one.negatives), kinds, one.grades)


def cycle(rng: random.Random, members: int, count: int) -> Iterator[int]:
    """``count`` numbers below ``members``, in successive random orders of all of them."""
    while count > 0:
        order = rng.sample(range(members), members)[:count]
        count -= len(order)
        yield from order


def _short(text: str, limit: int = 60) -> str:
    shown = repr(text)
    return shown if len(shown) <= limit else shown[:limit] + "…"
