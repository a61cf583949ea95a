"""Cosines equal those of a plain loop with a fake embedder; undefined pairs are left out."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from fusion_detox.errors import DataError, ModelError
from fusion_detox.evaluation.metrics import similarity as module
from fusion_detox.evaluation.metrics.similarity import cosines, similarity
from fusion_detox.evaluation.metrics.statistics import Resamples


def embed(texts):
    """The sum of one fixed random direction per word: texts with common words are similar."""
    assert all(text.strip() for text in texts)
    assert len(set(texts)) == len(texts)
    return np.stack(
        [
            sum(np.random.default_rng(zlib.crc32(w.encode())).normal(size=16) for w in t.split())
            for t in texts
        ]
    ).astype(np.float32)


def cosine(one, other):
    a, b = embed([one])[0].astype(float), embed([other])[0].astype(float)
    return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)


PROMPTS = ["the weather was", "she reads", "thank you"]
BASE = [["fine and warm", "cold the weather"], ["every morning", "she"], ["so much", "you"]]
OURS = [["fine and mild", "cold the weather"], ["every day", ""], ["  ", " you "]]


def test_similarities_equal_a_plain_loop():
    found = similarity(PROMPTS, OURS, embed, Resamples(3, 0), model="fake", base=BASE)
    prompts = [
        np.mean([cosine(p, s.strip()) for s in new if s.strip()])
        for p, new in zip(PROMPTS, OURS, strict=True)
    ]
    base = [
        np.mean([cosine(b, s.strip()) for b, s in zip(old, new, strict=True) if s.strip()])
        for old, new in zip(BASE, OURS, strict=True)
    ]
    assert found["model"] == "fake"
    assert found["to_prompt"][0] == pytest.approx(np.mean(prompts), abs=1e-6)
    assert found["to_base"][0] == pytest.approx(np.mean(base), abs=1e-6)
    assert found["to_base"][1] < found["to_base"][0] < found["to_base"][2]
    assert found["left_out"] == {"to_prompt": 2, "to_base": 2}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_base_has_similarity_1_to_itself():
    found = similarity(PROMPTS, BASE, embed, Resamples(3, 0), model="fake", base=BASE)
    assert found["to_base"] == pytest.approx([1.0, 1.0, 1.0], abs=1e-12)
    alone = similarity(PROMPTS, BASE, embed, Resamples(3, 0), model="fake")
    assert alone["to_base"] is None
    assert alone["to_prompt"] == found["to_prompt"]
    assert alone["left_out"] == {"to_prompt": 0, "to_base": None}


def test_a_prompt_whose_samples_are_all_empty_is_left_out():
    found = similarity(["a", "b"], [["a"], [""]], embed, Resamples(2, 0), model="fake")
    assert found["to_prompt"] == [pytest.approx(1.0), None, None]
    none = similarity(["a", "b"], [[""], []], embed, Resamples(2, 0), model="fake")
    assert none["to_prompt"] == [None, None, None]
    assert none["left_out"]["to_prompt"] == 1


def test_blocks_of_prompts_change_nothing(monkeypatch):
    whole = cosines(BASE, OURS, embed)
    monkeypatch.setattr(module, "_BLOCK", 1)
    for one, other in zip(cosines(BASE, OURS, embed), whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_embedding_without_direction_has_no_cosine():
    def flat(texts):
        return np.array([[0.0, 0.0] if text == "zero" else [3.0, 4.0] for text in texts])

    (found,) = cosines([["zero", "a"]], [["a", "b"]], flat)
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: similarity(["a"], [], embed, Resamples(1, 0), model="m"),
            DataError,
            "samples has continuations of 0 prompts, but there are 1",
        ),
        (
            lambda: similarity(["a"], [["b"]], embed, Resamples(1, 0), model="m", base=[]),
            DataError,
            "base has continuations of 0 prompts",
        ),
        (lambda: cosines([["a", "b"]], [["a"]], embed), DataError, "cannot be paired"),
        (
            lambda: cosines([["a"]], [["b"]], lambda texts: np.zeros(2)),
            ModelError,
            r"2 texts have shape \(2,\)",
        ),
        (
            lambda: cosines([["a"]], [["b"]], lambda texts: np.full((2, 3), np.nan)),
            ModelError,
            "not finite",
        ),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_cached_vectors_are_computed_once():
    asked = []

    def counted(texts):
        asked.extend(texts)
        return embed(texts)

    kept = module.Remembered(counted, [*PROMPTS, *(f" {text} " for row in BASE for text in row)])
    for ours in (OURS, BASE, OURS):
        plain = similarity(PROMPTS, ours, embed, Resamples(3, 0), model="fake", base=BASE)
        assert similarity(PROMPTS, ours, kept, Resamples(3, 0), model="fake", base=BASE) == plain
    texts = [*PROMPTS, *(text for row in BASE for text in row)]
    assert [asked.count(text) for text in texts] == [1] * len(texts)
    assert asked.count("every day") == 4  # embedded in both calls
