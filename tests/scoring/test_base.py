"""Batched scoring, and failures of single texts."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import pytest

from fusion_detox.errors import ConfigError, DataError
from fusion_detox.scoring.base import (
    NoTextScoredError,
    ScoringError,
    beginning,
    file_safe,
    score_batches,
)
from fusion_detox.scoring.lexical import LexicalScorer


def lengths(texts):
    return {"toxicity": [len(text) / 100 for text in texts], "other": [0.5] * len(texts)}


def run(score_batch, texts, **settings):
    options = {"name": "test", "types": ["toxicity", "other"], "batch_size": 3, **settings}
    return score_batches(score_batch, texts, **options)


def test_each_distinct_text_once_in_order_of_length():
    seen = []

    def score(texts):
        seen.append(texts)
        return lengths(texts)

    texts = ["ccc", "a", "", "bb", "a", "dddd", " \n", "ccc"]
    assert run(score, texts) == {
        "toxicity": [0.03, 0.01, 0.0, 0.02, 0.01, 0.04, 0.0, 0.03],
        "other": [0.5, 0.5, 0.0, 0.5, 0.5, 0.5, 0.0, 0.5],
    }
    assert seen == [["a", "bb", "ccc"], ["dddd"]]


def test_only_texts_that_fail_are_nan(caplog):
    def score(texts):
        if "bb" in texts:
            raise RuntimeError("the model\nstumbles")
        return lengths(texts)

    with caplog.at_level(logging.WARNING):
        scores = run(score, ["a", "bb", "ccc", "dddd"])
    assert scores["toxicity"] == [0.01, pytest.approx(math.nan, nan_ok=True), 0.03, 0.04]
    assert [math.isnan(value) for value in scores["other"]] == [False, True, False, False]
    assert [record.getMessage() for record in caplog.records] == [
        "test could not score 'bb': the model stumbles"
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.5])
def test_a_score_outside_0_to_1_is_a_failure(bad):
    def score(texts):
        return {**lengths(texts), "other": [bad if text == "a" else 0.1 for text in texts]}

    scores = run(score, ["a", "bb"])
    assert math.isnan(scores["toxicity"][0])
    assert scores["toxicity"][1] == 0.02


def test_many_failures_are_counted_rather_than_listed(caplog):
    def score(texts):
        if len(texts[0]) > 1:
            raise ValueError("no")
        return lengths(texts)

    texts = ["a", *("b" * size for size in range(2, 60))]
    with caplog.at_level(logging.WARNING):
        run(score, texts, batch_size=1)
    assert len(caplog.records) == 21
    assert caplog.records[-1].getMessage() == "test could not score 58 texts in total"


def test_the_failure_of_all_texts_is_explained():
    def score(texts):
        raise RuntimeError("CUDA error")

    message = "could not score any of 2 texts; the reason for 'a' was: CUDA error"
    with pytest.raises(NoTextScoredError, match=message):
        run(score, ["a", "bb", ""])


def test_a_wrong_number_of_scores_is_a_failure():
    with pytest.raises(NoTextScoredError, match="1 texts, but scores for"):
        run(lambda texts: {"toxicity": [], "other": []}, ["a", "b"])


def test_errors_of_this_library_are_raised():
    def score(texts):
        raise ScoringError("the service is gone")

    with pytest.raises(ScoringError, match="the service is gone"):
        run(score, ["a", "b"])


def test_nothing_to_score():
    def never(texts):
        raise AssertionError(texts)

    assert run(never, []) == {"toxicity": [], "other": []}
    assert run(never, [" "], blank={"other": 1.0}) == {"toxicity": [0.0], "other": [1.0]}


def test_invalid_arguments_raise():
    with pytest.raises(DataError, match="texts must be a list, but is a single text: 'hello'"):
        run(lengths, "hello")
    with pytest.raises(DataError, match="text 1 must be a string, but is a NoneType"):
        run(lengths, ["a", None])
    with pytest.raises(ConfigError, match=r"batch_size must be a .* at least 1, but is 0"):
        run(lengths, ["a"], batch_size=0)


def test_names_for_files_and_messages():
    assert file_safe("classifier:unitary/toxic-bert") == "classifier-unitary--toxic-bert"
    assert file_safe("../é") == "unnamed"
    assert beginning("x" * 50) == repr("x" * 40 + "…")


def test_the_lexical_scorer_implements_the_interface():
    scorer = LexicalScorer.load()
    texts = ["Thank you so much.", "you idiot", ""]
    assert scorer.score_types(texts) == {"toxicity": scorer.score(texts)}
    record = scorer.record()
    assert record["truncation"] == "none"
    assert len(record["weights"]) == 12


def test_importing_scorers_is_light():
    code = """
import sys
from fusion_detox.scoring import Scorer, make_scorer, SCORERS, CachedScorer
heavy = {"torch", "transformers", "numpy", "detoxify", "sentence_transformers", "sklearn"}
print(sorted(heavy & set(sys.modules)))
import fusion_detox.scoring as scoring
assert all(getattr(scoring, name) is not None for name in scoring.__all__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
