"""Cached scores: computed once, kept through a kill, shared between processes."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys

import pytest

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.scoring.base import NoTextScoredError, ScoringError, score_batches
from fusion_detox.scoring.cache import CachedScorer


class Counting:
    name = "counting"

    def __init__(self, version=1):
        self.version, self.asked, self.fails = version, [], ()

    def record(self):
        return {"model": "counting", "version": self.version}

    def score(self, texts):
        return self.score_types(texts)["toxicity"]

    def score_types(self, texts):
        return score_batches(
            self._batch, texts, name=self.name, types=["toxicity", "insult"], batch_size=2
        )

    def _batch(self, texts):
        if any(text in self.fails for text in texts):
            raise ValueError("no")
        self.asked += texts
        return {"toxicity": [1 / (3 + len(t)) for t in texts], "insult": [0.1] * len(texts)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.jsonl"


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_second_run_scores_new_texts_only(path):
    texts = ["a", "bb", "ccc", "a", "\ud800", ""]
    first = Counting()
    scores = CachedScorer(first, path).score_types(texts)
    assert scores == Counting().score_types(texts)
    assert sorted(first.asked) == ["a", "bb", "ccc", "\ud800"]
    second = Counting()
    again = CachedScorer(second, path)
    assert again.score_types([*reversed(texts), "new"]) == Counting().score_types(
        [*reversed(texts), "new"]
    )
    assert second.asked == ["new"]
    assert again.score(texts) == scores["toxicity"]  # identical to the last digit
    assert (again.name, again.record()) == ("counting", second.record())


def test_another_record_is_another_scorer(path):
    CachedScorer(Counting(), path).score(["a", "bb"])
    other = Counting(version=2)
    CachedScorer(other, path).score(["a", "ccc"])
    assert other.asked == ["a", "ccc"]
    assert len({row["scorer"] for row in rows(path)}) == 2
    same = Counting()
    CachedScorer(same, path).score(["a", "bb"])
    assert same.asked == []


def test_failed_texts_are_not_stored(path):
    scorer = Counting()
    scorer.fails = ["bb"]
    assert math.isnan(CachedScorer(scorer, path).score(["a", "bb"])[1])
    assert len(rows(path)) == 1
    scorer = Counting()
    assert CachedScorer(scorer, path).score(["a", "bb"]) == [0.25, 0.2]
    assert scorer.asked == ["bb"]


def test_a_text_that_fails_again_does_not_hide_cached_scores(path):
    scorer = Counting()
    scorer.fails = ["bb"]
    cached = CachedScorer(scorer, path)
    cached.score(["a", "bb"])
    scores = cached.score_types(["a", "bb"])  # no new text except the one that fails
    assert scores["toxicity"][0] == 0.25
    assert all(math.isnan(scores[kind][1]) for kind in ("toxicity", "insult"))
    with pytest.raises(NoTextScoredError):
        cached.score(["bb"])


@pytest.mark.parametrize("cut", [1, 9, 30, 100])
def test_a_line_torn_by_a_kill_is_cut_off(path, caplog, cut):
    texts = ["a", "bb", "ccc"]
    scores = CachedScorer(Counting(), path).score(texts)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    scorer = Counting()
    with caplog.at_level(logging.WARNING):
        cached = CachedScorer(scorer, path)
    assert "the last line was torn by a kill, so it is removed" in caplog.text
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    assert cached.score(texts) == scores
    assert scorer.asked == ["ccc"]
    assert path.read_bytes() == whole


def test_an_error_keeps_earlier_scores(path):
    class Gives(Counting):
        def score_types(self, texts):
            if self.asked:
                raise ScoringError("the service is gone")
            return super().score_types(texts)

    with pytest.raises(ScoringError, match="the service is gone"):
        CachedScorer(Gives(), path).score([f"text {i:02}" for i in range(30)])
    assert len(rows(path)) == 8
    scorer = Counting()
    CachedScorer(scorer, path).score([f"text {i:02}" for i in range(30)])
    assert len(scorer.asked) == 22


@pytest.mark.parametrize(
    "line",
    [
        "hello",
        "[]",
        '{"scorer": "x", "text": "y"}',
        '{"scorer": "x", "text": "y", "scores": {"insult": 0.5}}',
        '{"scorer": "x", "text": "y", "scores": {"toxicity": 2}}',
        '{"scorer": "x", "text": "y", "scores": {"toxicity": NaN}}',
    ],
)
def test_a_broken_file_raises_an_error_with_the_remedy(path, line):
    CachedScorer(Counting(), path).score(["a"])
    path.write_text(path.read_text() + line + "\n")
    content = path.read_bytes()
    message = r"line 2 of .*scores\.jsonl is not a row of scores.*Delete that line"
    with pytest.raises(DataError, match=message):
        CachedScorer(Counting(), path)
    assert path.read_bytes() == content


def test_a_foreign_file_is_not_changed(path):
    path.write_text("my diary")
    with pytest.raises(DataError, match=r"line 1 of .* name another file"):
        CachedScorer(Counting(), path)
    assert path.read_text() == "my diary"


def test_unusable_files(tmp_path):
    with pytest.raises(DataFileError, match=r"the folder .*missing of the scores does not exist"):
        CachedScorer(Counting(), tmp_path / "missing" / "scores.jsonl")
    with pytest.raises(DataFileError, match=r"cannot read the scores in .*name another file"):
        CachedScorer(Counting(), tmp_path)


def test_two_scorers_on_one_file_share_scores(path):
    one, two = Counting(), Counting()
    first, second = CachedScorer(one, path), CachedScorer(two, path)
    first.score(["a", "bb"])
    second.score(["bb", "ccc"])
    first.score(["ccc", "a"])
    assert (one.asked, two.asked) == (["a", "bb"], ["ccc"])


def test_a_deleted_file_is_created_again(path):
    cached = CachedScorer(Counting(), path)
    cached.score(["a", "bb"])
    path.unlink()
    assert cached.score(["a", "ccc"]) == [0.25, pytest.approx(1 / 6)]
    assert len(rows(path)) == 1


WORK = """
import sys
from fusion_detox.scoring.cache import CachedScorer

class Scorer:
    name = "counting"
    def record(self):
        return {"model": "counting", "version": 1}
    def score_types(self, texts):
        return {kind: [0.5] * len(texts) for kind in ("toxicity", "insult")}

cached = CachedScorer(Scorer(), sys.argv[1])
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 80):
    assert cached.score([f"text {number}"]) == [0.5]
"""


def test_several_processes_append(path):
    command = [sys.executable, "-c", WORK, str(path)]
    workers = [subprocess.Popen([*command, str(start)]) for start in (0, 40, 80)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert len({row["text"] for row in rows(path)}) == 160
    scorer = Counting()
    assert CachedScorer(scorer, path).score([f"text {i}" for i in range(160)]) == [0.5] * 160
    assert scorer.asked == []


def test_nothing_to_score(path):
    assert CachedScorer(Counting(), path).score_types([]) == {"toxicity": [], "insult": []}
    with pytest.raises(DataError, match="must be a list, but is a single text"):
        CachedScorer(Counting(), path).score("text")
