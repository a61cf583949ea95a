"""Batches of paraphrase sets: draws, label masks, truncation and invalid sets."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
import torch

from fusion_detox.errors import DataError
from fusion_detox.training.contrastive.batches import (
    AnchorDraws,
    check_sets,
    collate,
    encode_sets,
    grades,
    grades_digest,
    whole,
)
from fusion_detox.training.data.blocks import Blocks
from fusion_detox.training.data.pairs import ParaphraseSet
from fusion_detox.training.loss import IGNORED

MILD = ParaphraseSet("It was fine.", ("It was fine.", "All was well."), ("Damn stupid thing.",))
DIALOGUE = ParaphraseSet(
    "Thank you.", ("Thank you.",), ("Shut up, you idiot.",), prompt="Do you like it?\n\nA:"
)


def counted_text(tokenizer, row):
    ids, skipped = row
    return tokenizer.decode(ids[skipped:])


def test_every_wording_follows_bos_and_its_prompt(byte_tokenizer):
    for one in encode_sets(byte_tokenizer, [MILD, DIALOGUE], bos_id=0, context_length=64):
        for ids, skipped in (*one.positives, *one.negatives):
            assert ids[0] == 0
            assert skipped >= 1
    _, dialogue = encode_sets(byte_tokenizer, [MILD, DIALOGUE], bos_id=0, context_length=64)
    assert counted_text(byte_tokenizer, dialogue.positives[0]) == "Thank you."
    assert counted_text(byte_tokenizer, dialogue.negatives[0]) == "Shut up, you idiot."
    ids, skipped = dialogue.positives[0]
    assert byte_tokenizer.decode(ids[1:skipped]) == DIALOGUE.prompt


def test_token_that_straddles_the_end_of_the_prompt_counts(byte_tokenizer):
    """``stupid`` is one token; if the prompt ends inside it, it counts as part of the wording."""
    assert len(byte_tokenizer(" stupid")["input_ids"]) == 1
    one = ParaphraseSet("x", ("pid thing", "per"), ("pid",), prompt="What a stu")
    (encoded,) = encode_sets(byte_tokenizer, [one], bos_id=0, context_length=64)
    assert counted_text(byte_tokenizer, encoded.positives[0]) == " stupid thing"


def test_truncation_keeps_the_end_of_the_prompt_and_the_start_of_the_wording(
    byte_tokenizer, caplog
):
    long = ParaphraseSet(
        "Thank you so much.", ("Thank you so much for your help.",), ("You idiot.",),
        prompt="She reads three newspapers every morning before the children wake up. Then:",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        (encoded,) = encode_sets(byte_tokenizer, [long], bos_id=0, context_length=16)
    assert "2 of 2 wordings were truncated to the context of 16 tokens" in caplog.text
    kept = {skipped for _, skipped in (*encoded.positives, *encoded.negatives)}
    assert len(kept) == 1  # the same part of the prompt before each wording
    ids, skipped = encoded.positives[0]
    assert len(ids) <= 16
    prompt, wording = byte_tokenizer.decode(ids[1:skipped]), byte_tokenizer.decode(ids[skipped:])
    assert prompt
    assert long.prompt.endswith(prompt)
    assert long.positives[0].startswith(wording)
    assert len(ids) - skipped >= 8
    assert byte_tokenizer.decode(encoded.negatives[0][0]).endswith("You idiot.")


def test_short_texts_are_not_truncated(byte_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        encode_sets(byte_tokenizer, [MILD, DIALOGUE], bos_id=0, context_length=64)
    assert not caplog.text


def test_batch_contains_each_wording_once_and_counts_no_padding(byte_tokenizer):
    sets = encode_sets(byte_tokenizer, [MILD, DIALOGUE], bos_id=0, context_length=64)
    batch = collate([whole(one) for one in sets], pad_id=7)
    assert batch["group"].tolist() == [0, 0, 0, 1, 1]
    assert batch["positive"].tolist() == [True, True, False, True, False]
    rows = [row for one in sets for row in (*one.positives, *one.negatives)]
    for number, (ids, skipped) in enumerate(rows):
        size = len(ids)
        assert batch["input_ids"][number, :size].tolist() == ids
        assert (batch["input_ids"][number, size:] == 7).all()
        assert batch["attention_mask"][number].tolist() == [1] * size + [0] * (
            batch["input_ids"].shape[1] - size
        )
        counted = (batch["labels"][number] != IGNORED).nonzero().flatten().tolist()
        assert counted == list(range(skipped, size))
        assert batch["labels"][number, counted].tolist() == ids[skipped:]


@pytest.fixture
def many(byte_tokenizer):
    sets = [
        ParaphraseSet(
            str(number),
            tuple(f"mild {number} {i}" for i in range(1 + number % 4)),
            tuple(f"harsh {number} {i}" for i in range(number % 7)),
        )
        for number in range(12)
    ]
    return encode_sets(byte_tokenizer, sets, bos_id=0, context_length=32)


def test_draws(many):
    draws = AnchorDraws(many, 30, positives=2, negatives=3, seed=5)
    assert len(draws) == 30
    used = Counter()
    for index in range(30):
        drawn = draws[index]
        ours = [row for row, kind in zip(drawn.rows, drawn.positive, strict=True) if kind]
        theirs = [row for row, kind in zip(drawn.rows, drawn.positive, strict=True) if not kind]
        (one,) = [one for one in many if ours[0] in one.positives]
        used[many.index(one)] += 1
        assert len(ours) == min(2, len(one.positives))
        assert len(theirs) == min(3, len(one.negatives))
        assert all(row in one.positives for row in ours)
        assert all(row in one.negatives for row in theirs)
        assert len({tuple(ids) for ids, _ in drawn.rows}) == len(drawn.rows)  # none twice
    assert set(used) == set(range(12))
    assert set(used.values()) == {2, 3}


def test_draw_depends_only_on_seed_and_index(many):
    first = AnchorDraws(many, 30, positives=2, negatives=3, seed=5)
    again = AnchorDraws(many, 30, positives=2, negatives=3, seed=5)
    assert [again[i] for i in reversed(range(30))] == [first[i] for i in reversed(range(30))]
    other = AnchorDraws(many, 30, positives=2, negatives=3, seed=6)
    assert [other[i] for i in range(30)] != [first[i] for i in range(30)]
    # In its second draw, the same anchor has other wordings.
    assert len({str(first[index].rows) for index in range(30)}) > 12


def test_each_anchor_is_accompanied_by_general_text(many):
    ids = np.arange(40, dtype=np.int32).reshape(5, 8)
    blocks = Blocks(ids, ids, np.full(5, 8, dtype=np.int32))
    draws = AnchorDraws(many, 10, positives=1, negatives=1, general=blocks, seed=1)
    batch = collate([draws[i] for i in range(4)])
    assert batch["general_input_ids"].shape == (4, 8)
    assert torch.equal(batch["general_labels"], batch["general_input_ids"])
    seen = {int(draws[i].general["input_ids"][0]) for i in range(10)}
    assert seen == {0, 8, 16, 24, 32}
    assert "general_input_ids" not in collate([whole(many[0])])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], "there is no paraphrase set to learn from"),
        ([ParaphraseSet("Hello", (), ("x",))], "the anchor 'Hello' has no positive"),
        (
            [MILD, ParaphraseSet("Hello", ("a b",), ("a  b\n",))],
            "the anchor 'Hello' has 'a b' as both a positive and a negative: remove it",
        ),
    ],
)
def test_unusable_sets(sets, message):
    with pytest.raises(DataError, match=message):
        check_sets(sets)


def test_a_wording_without_a_token_of_its_own(byte_tokenizer):
    one = ParaphraseSet("Hello", ("",), ("x",), prompt="Well")
    with pytest.raises(DataError, match="'' has no token after its prompt"):
        encode_sets(byte_tokenizer, [one], bos_id=0, context_length=32)


def test_different_scores_make_a_different_run():
    """The key of a set ignores its provenance, but the likelihood ratio learns from the scores."""
    rows = [ParaphraseSet("a", ("a b",), ("a c",), "", score) for score in SCORED]
    assert len({one.key for one in rows}) == 1
    assert len({grades_digest([one]) for one in rows}) == 3
    assert [grades(one) for one in rows] == [(0.0, 1.0), (0.1, 0.6), (0.1, 0.9)]
    half = {"scores": {"positives": [{"toxicity": 0.1}], "negatives": [{"similarity": 1.0}]}}
    assert grades(ParaphraseSet("a", ("a b",), ("a c",), "", half)) == (0.0, 1.0)


SCORED = [
    {},
    {"scores": {"positives": [{"toxicity": 0.1}], "negatives": [{"toxicity": 0.6}]}},
    {"scores": {"positives": [{"toxicity": 0.1}], "negatives": [{"toxicity": 0.9}]}},
]
