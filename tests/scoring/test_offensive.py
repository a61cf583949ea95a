"""Offensive words are found in whole texts, and in texts that are cut into pieces."""

from fusion_detox.scoring.offensive import (
    mask_words,
    offensive_after,
    offensive_pieces,
    offensive_spans,
)


def score(words):
    assert len(set(words)) == len(words), "each word is scored once"
    return [0.5 if word in ("bad", "badly") else 0.49 for word in words]


def test_words_are_found_where_they_stand():
    text = "bad badge, bad"
    assert [text[slice(*span)] for span in offensive_spans(text, score)] == ["bad", "bad"]
    assert offensive_spans(text, score)[1] == (11, 14)
    assert offensive_spans("", score) == []
    assert mask_words(text, score) == "b*d badge, b*d"


def test_a_piece_counts_if_its_word_does():
    assert offensive_pieces(["so b", "a", "d.", " b", "ay"], score) == [True] * 3 + [False] * 2
    assert offensive_pieces(["ba", "d", "ge"], score) == [False] * 3
    assert offensive_pieces([], score) == []


def test_a_next_piece_counts_with_the_word_that_it_continues():
    assert offensive_after("so b", ["ad", "ay", " bad", " day", "."], score) == [
        *(True, False, True, False, False)
    ]
    assert offensive_after("bad", ["ly", "ge", " day"], score) == [True, False, False]
