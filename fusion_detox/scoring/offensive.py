"""Words that are offensive by themselves: where they stand in a text, and a way to mask them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Score = Callable[[Sequence[str]], Sequence[float]]
"""Scores texts from 0 to 1, such as ``LexicalScorer.score``."""

OFFENSIVE = 0.5
"""A word counts as offensive from this score on."""
_WORD = re.compile(r"\w+")
_FIRST_WORD = re.compile(r"\w*")


def offensive_spans(text: str, score: Score) -> list[tuple[int, int]]:
    """Character ranges of the words of a text that score as toxic by themselves."""
    found = list(_WORD.finditer(text))
    words = sorted({one.group() for one in found})
    toxic = {word for word, value in zip(words, score(words), strict=True) if value >= OFFENSIVE}
    return [one.span() for one in found if one.group() in toxic]


def offensive_pieces(pieces: Sequence[str], score: Score) -> list[bool]:
    """For each piece of a text, whether it is part of an offensive word of the whole text."""
    spans = offensive_spans("".join(pieces), score)
    found, start = [], 0
    for piece in pieces:
        stop = start + len(piece)
        found.append(any(begin < stop and end > start for begin, end in spans))
        start = stop
    return found


def offensive_after(text: str, pieces: Sequence[str], score: Score) -> list[bool]:
    """For each of some pieces, whether it is part of an offensive word if it follows a text."""
    # Backwards, since a search for the end of a text is quadratic.
    found = _FIRST_WORD.match(text[::-1])
    begun = found.group()[::-1] if found else ""
    return [offensive_pieces((begun, piece), score)[1] for piece in pieces]


def mask_words(text: str, score: Score) -> str:
    """Replaces the vowels of offensive words with ``*``, keeping the length."""
    parts, end = [], 0
    for start, stop in offensive_spans(text, score):
        word = text[start:stop]
        hidden = re.sub(r"(?i)[aeiou]", "*", word)
        masked = hidden if hidden != word else word[:1] + "*" * (len(word) - 1)
        parts += [text[end:start], masked]
        end = stop
    return "".join([*parts, text[end:]])


def masked_pieces(pieces: Sequence[str], mask: Callable[[str], str]) -> list[str]:
    """The pieces of a text in which words that span several pieces are masked, too.

    Args:
        pieces: The pieces.
        mask: Masks words of a text and keeps its length, as :func:`mask_words` does.
    """
    whole, start = mask("".join(pieces)), 0
    found = []
    for piece in pieces:
        found.append(whole[start : start + len(piece)])
        start += len(piece)
    return found
