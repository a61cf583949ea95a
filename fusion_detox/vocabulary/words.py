"""``WordTokens``: the tokens of a target that complete a listed word, however it is split."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from fusion_detox.vocabulary.token_table import TokenTable

# UTF-8 of letters, near enough: a-z, U+00C0 to U+1FFF, and U+3040 to U+FFBF. So not Latin-1,
# general and Japanese punctuation, symbols, emoji, or U+FFFD, which stands for invalid bytes.
_LETTERS = (
    rb"(?:[a-z]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe1\xe4-\xee][\x80-\xbf]{2}"
    rb"|\xe3[\x81-\xbf][\x80-\xbf]|\xef[\x80-\xbe][\x80-\xbf])+"
)
WORD = re.compile(_LETTERS)
"""Finds the runs of letters in a text in lower case."""


class WordTokens:
    """How far each token of a target is held back because it completes a listed word.

    A token completes a word if the word's last letter is the token's last byte, or if the token
    goes on after it with something other than a letter. Case is ignored. A word that only ends
    inside a longer one, as "ass" does in "glass", does not count.

    Args:
        words: Letters in lower case, and by how many nats to hold each word back.
        target: The target's tokens.

    Attributes:
        weights: ``(2, vocab)`` nats, of each token if the text ends inside a word, and if it does
            not.
        completing: For the beginning of a listed word at the end of a text, the ids of the tokens
            that complete the word, and their weights; nothing if there are none.
        longest: Number of bytes of the longest word.
    """

    def __init__(self, words: Mapping[str, float], target: TokenTable) -> None:
        spelled = {word.encode(): weight for word, weight in words.items()}
        self.longest = max(map(len, spelled), default=0)
        self.weights = torch.zeros(2, len(target.token_bytes))
        ends = {word[begin:] for word in spelled for begin in range(len(word))}
        heads: dict[bytes, list[int]] = defaultdict(list)
        for token, data in enumerate(target.token_bytes):
            for start, letters in _runs((data or b"").lower()):
                if start == 0 and letters in ends:
                    heads[letters].append(token)
                if weight := spelled.get(letters):
                    self.weights[0 if start else 1 :, token].clamp_(min=weight)
        rests: dict[bytes, dict[int, float]] = defaultdict(dict)
        for word, weight in spelled.items():
            for end in range(1, len(word)):
                rests[word[:end]].update(dict.fromkeys(heads.get(word[end:], ()), weight))
        self.completing = {
            begun: (torch.tensor(list(found)), torch.tensor(list(found.values())))
            for begun, found in rests.items()
            if found
        }


def _runs(text: bytes) -> Iterable[tuple[int, bytes]]:
    """The runs of letters, and where each starts."""
    bare = text.removeprefix(b" ")
    if bare.isalpha():  # as most tokens are
        return ((len(text) - len(bare), bare),)
    return ((found.start(), found[0]) for found in WORD.finditer(text))


def is_word(text: str) -> bool:
    """Whether a ``WordTokens`` can find it: letters alone, in lower case."""
    return WORD.fullmatch(text.encode()) is not None and text == text.lower()
