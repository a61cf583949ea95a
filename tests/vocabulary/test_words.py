"""Which tokens complete a listed word, compared with reading whole texts."""

from __future__ import annotations

import pytest
import torch

from fusion_detox.vocabulary.token_table import TokenTable
from fusion_detox.vocabulary.words import WORD, WordTokens, is_word

WORDS = {"idiot": 3.0, "idiots": 2.0, "stupid": 2.5, "he": 1.0, "ever": 0.5, "at": 4.0}
TEXTS = [
    "You are an idio", "You IDIO", "such a stu", "glass", "w", "t", "“stupi", "The", "hé",
    "naïve i", "so s", "…", "he", "nev", "", "in 1987 ", "an idiot", "(a", "chat", "over-e",
    "日本 i", "a_id",
]  # fmt: skip


def runs(text):
    """The end and the letters of each run of letters, by the Unicode database."""
    found, run = [], ""
    for place, letter in enumerate(f"{text} "):
        if letter.isalpha():
            run += letter.lower()
        else:
            found += [(place, run)] if run else []
            run = ""
    return found


@pytest.mark.parametrize("name", ["byte_tokenizer", "other_tokenizer", "sentencepiece_tokenizer"])
def test_a_token_counts_if_a_listed_word_ends_inside_it(name, request):
    table = TokenTable.from_tokenizer(request.getfixturevalue(name))
    tokens = WordTokens(WORDS, table)
    completed = 0
    for text in TEXTS:
        runs_before = list(WORD.finditer(text.encode().lower()))
        inside = runs_before and runs_before[-1].end() == len(text.encode())
        unfinished = runs_before[-1][0] if inside else b""
        weights = tokens.weights[0 if unfinished else 1].clone()
        if unfinished in tokens.completing:
            ids, nats = tokens.completing[unfinished]
            weights[ids] = torch.maximum(weights[ids], nats)
        for token, data in enumerate(table.token_bytes):
            try:
                piece = (data or b"").decode()
            except UnicodeDecodeError:
                continue  # a part of a character
            whole = text + piece
            ends = [WORDS.get(run, 0.0) for end, run in runs(whole) if end > len(text)]
            assert weights[token] == max(ends, default=0.0), (text, piece)
            completed += bool(weights[token])
    assert completed > 40


def test_a_word_that_ends_inside_a_longer_one_does_not_count(other_tokenizer):
    table = TokenTable.from_tokenizer(other_tokenizer)
    ids = {data: token for token, data in enumerate(table.token_bytes) if data}
    tokens = WordTokens({"ass": 1.0, "e": 1.0}, table)
    assert tokens.weights[1, ids[b"e"]] == 1.0
    assert tokens.weights[0, ids[b"e"]] == 0.0, "the end of 'the' is not the word 'e'"
    assert b"gla" not in tokens.completing


def test_what_is_a_word():
    assert all(map(is_word, ["idiot", "scheiße", "дурак", "ばか"]))
    assert not any(map(is_word, ["", "Idiot", "two words", "dumb-ass", "f*ck", "1st", "don't"]))
