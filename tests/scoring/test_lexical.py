"""The lexical scorer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion_detox.errors import DataFileError, ModelError
from fusion_detox.scoring import LexicalScorer, lexical

TOXIC = [
    "you are a stupid bitch",
    "Fuck you, you worthless piece of shit!",
    "what an idiot , shut the fuck up",
    "THESE RETARDED ASSHOLES",
]
CLEAN = [
    "Thank you so much for your help.",
    "The committee met on Tuesday.",
    "I am a gay man and proud of it.",
    "The black woman walked her dog.",
    "My Muslim neighbours are kind.",
    "Jewish people celebrate Hanukkah.",
    "She is a transgender woman from Mexico.",
]


@pytest.fixture(scope="module")
def scorer() -> LexicalScorer:
    return LexicalScorer.load()


def test_toxic_text_scores_above_harmless_text_that_names_groups(scorer: LexicalScorer) -> None:
    assert min(scorer.score(TOXIC)) > 0.8
    assert max(scorer.score(CLEAN)) < 0.5


def test_scores_are_probabilities(scorer: LexicalScorer) -> None:
    odd = ["a", ".", "\x00", "\ud800", "🙂" * 50, "fuck " * 5000, "日本語", "x" * 3000]
    assert all(0.0 <= score <= 1.0 for score in scorer.score(TOXIC + CLEAN + odd))


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_empty_text_is_not_toxic(scorer: LexicalScorer, text: str) -> None:
    assert scorer.score([text]) == [0.0]


def test_punctuation_and_function_words_are_not_toxic(scorer: LexicalScorer) -> None:
    assert max(scorer.score([".", "!!", "the", ". I", "and then he"])) < 0.2


def test_score_does_not_depend_on_the_batch(scorer: LexicalScorer) -> None:
    together = scorer.score(TOXIC + CLEAN)
    assert together == [scorer.score([text])[0] for text in TOXIC + CLEAN]
    assert scorer.score([]) == []


def test_hashes_are_the_same_on_every_machine() -> None:
    buckets, values = lexical.hashed_features("a a")
    assert buckets.tolist() == [26515, 58844, 92369, 168770, 175104]
    assert values[0] == pytest.approx(1.6931, abs=1e-4)


def test_case_and_spaced_punctuation_do_not_matter(scorer: LexicalScorer) -> None:
    assert len(set(scorer.score(["You idiot .", "you IDIOT.", " you idiot. "]))) == 1


def test_record_names_data_licences_and_quality(scorer: LexicalScorer) -> None:
    record = scorer.record()
    assert record["auc"]["human_labels"] > 0.9
    assert all(source["licence"] for source in record["sources"].values())


def test_weights_are_small() -> None:
    assert Path(lexical.__file__).with_suffix(".safetensors").stat().st_size <= 1_000_000


def test_missing_or_broken_weights_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lexical.safetensors"
    monkeypatch.setattr(lexical, "_WEIGHTS", path)
    with pytest.raises(DataFileError, match="reinstall the package"):
        LexicalScorer.load()
    path.write_bytes(b"not safetensors")
    with pytest.raises(DataFileError, match="reinstall the package"):
        LexicalScorer.load()


def test_weights_of_another_size_are_refused(scorer: LexicalScorer) -> None:
    with pytest.raises(ModelError, match="train_scorers"):
        LexicalScorer(scorer.weights[:-1], scorer.idf[:-1], 0.0)
