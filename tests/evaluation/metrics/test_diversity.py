"""Diversity against hand counts and a reference BLEU."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter

import numpy as np
import pytest

from fusion_detox.errors import DataError, MissingExtraError
from fusion_detox.evaluation.metrics.diversity import (
    degenerate,
    distinct,
    diversity,
    repeats,
    self_bleu,
    words,
)


def bleu(hypothesis, references):
    """BLEU-4 (Papineni et al. 2002), orders that the hypothesis has, smoothing of Chin-Yew and Och.

    The first order without a match counts 1/2 of a match, the second 1/4, and so on.
    """
    logs, zeros = [], 0
    for n in range(1, min(4, len(hypothesis)) + 1):

        def grams(words, n=n):
            return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))

        most = Counter()
        for reference in references:
            most |= grams(reference)
        found = grams(hypothesis)
        match, total = (found & most).total(), found.total()
        if not match:
            if n == 1:
                return 0.0
            zeros += 1
            match = 0.5**zeros
        logs.append(math.log(match / total))
    length = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    brevity = min(0.0, 1 - length / len(hypothesis))
    return math.exp(sum(logs) / len(logs) + brevity)


def test_words_and_punctuation():
    assert words("Don't go -- it’s 3.5 THINGS!") == [
        "don't", "go", "-", "-", "it’s", "3", ".", "5", "things", "!",
    ]  # fmt: skip
    assert words(" \n\t") == []
    assert words("Zürich naïve") == ["zürich", "naïve"]


def test_distinct():
    assert distinct([[1, 2, 1, 2], [1]], 2) == pytest.approx(2 / 3)
    assert distinct([["a", "a"], ["a"]], 1) == pytest.approx(1 / 3)
    assert distinct([(1, 2), (2, 1)], 2) == 1.0
    assert distinct([[1], []], 2) is None


SAMPLES = [
    "the cat sat on the mat and looked at the dog",
    "The cat sat on a chair, and looked at me.",
    "nothing of this kind happened yesterday",
    "cat",
    "the cat",
]


def test_self_bleu_is_bleu_against_the_others():
    pytest.importorskip("sacrebleu")
    split = [words(text) for text in SAMPLES]
    wanted = [bleu(one, split[:k] + split[k + 1 :]) for k, one in enumerate(split)]
    assert self_bleu(SAMPLES) == pytest.approx(np.mean(wanted), rel=1e-9)
    assert 0.1 < np.mean(wanted) < 0.9


def test_self_bleu_limits():
    pytest.importorskip("sacrebleu")
    assert self_bleu([SAMPLES[0]] * 3) == 1.0
    assert self_bleu(["one two three", "four five six"]) == 0.0
    assert self_bleu(["one two", "", "  "]) is None
    assert self_bleu([]) is None
    # Empty samples are not references.
    assert self_bleu([*SAMPLES, ""]) == self_bleu(SAMPLES)


def test_without_sacrebleu_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sacrebleu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingExtraError, match=r"\[evaluate\]"):
        self_bleu(["a b", "a c"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so it was and so it was and then", True),
        ("no no no no no", True),  # at positions 0 and 1
        ("no no no no", False),
        ("a b c d e a b c e d", False),
        ("", False),
        ("Go on. Go on. Go", True),
    ],
)
def test_repeats(text, found):
    assert repeats(text) is found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\u3000", "empty"),
        ("the the the the dog the", "one word"),
        ("the the the dog ran home", ""),  # half is not more than half
        ("no no no no no", ""),  # five words are too few to judge
        ("Yes.", ""),
        ("1987.", ""),
        ("!!!!!!!!!", ""),
        ("!!!!!!!!!!", "one character"),
        ("a aaa aaaaaa b", "one character"),
        ("{}[]()<>;:=+-*/", "few letters"),
        ("12:30, 14:45, 16:00", "few letters"),
        ("In 1987 the town built a new school; 240 pupils came.", ""),
        ("東京は日本の首都であり、世界最大の都市", ""),
        ("हिन्दी में लिखा हुआ वाक्य", ""),
        ("ha, ha, ha, ha, ha, ha", "one word"),
    ],
)
def test_degenerate(text, reason):
    assert degenerate(text) == reason


def test_diversity_by_hand():
    pytest.importorskip("sacrebleu")
    samples = [["one two", "one two"], ["", "a b c d a b c d"], ["{}[]()<>;:=+-*/"]]
    found = diversity(samples, [[2, 3], [0, 8], [15]])
    one = [words(text) for prompt in samples for text in prompt]
    total = sum(map(len, one))
    # one two one two a b c d a b c d, and 15 punctuation marks, all different
    assert found["dist_1"] == pytest.approx((2 + 4 + 15) / total)
    assert found["dist_2"] == pytest.approx((1 + 4 + 14) / (1 + 1 + 7 + 14))
    assert found["self_bleu"] == 1.0
    assert found["repetition"] == pytest.approx(1 / 5)
    assert found["empty"] == pytest.approx(1 / 5)
    assert found["degenerate"] == pytest.approx(2 / 5)
    assert found["tokens"] == pytest.approx(28 / 5)
    assert list(found) == [
        "dist_1", "dist_2", "dist_3", "self_bleu", "repetition", "empty", "degenerate", "tokens",
    ]  # fmt: skip
    nothing = diversity([[""], [" "]], [[0], [1]])
    assert nothing["dist_1"] is nothing["self_bleu"] is None
    assert (nothing["empty"], nothing["degenerate"]) == (1.0, 1.0)
    assert json.loads(json.dumps(nothing, allow_nan=False)) == nothing


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distinct([[1]], 0), "must be at least 1, but is 0"),
        (lambda: diversity([], []), "no samples"),
        (lambda: diversity([["a"]], [[1, 2]]), "one count per sample"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(DataError, match=message):
        call()
