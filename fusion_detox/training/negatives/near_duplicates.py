"""Which texts are nearly one another, in a set that grows: MinHash with bands (Broder 1997)."""

from __future__ import annotations

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

_SHINGLE = 5
# 24 bands of 3: texts with a Jaccard of .7 meet in a band with probability .9999, of .85 always.
_BANDS, _ROWS = 24, 3
_MULTIPLIERS = np.random.default_rng(0).integers(1, 1 << 63, _BANDS * _ROWS, dtype=np.uint64) | 1

Hashes = NDArray[np.uint64]


class NearDuplicates:
    """Remembers texts, and tells whether a new one shares enough with one of them.

    Similarity is the Jaccard coefficient of the sets of character 5-grams, in lower case and
    without punctuation, so that quotation marks and capitals make no difference.

    Args:
        threshold: Similarity from which two texts count as one; ``None`` for equal texts only.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._seen: set[str] = set()
        self._shingles: list[Hashes] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}

    def equal(self, text: str) -> bool:
        """Whether the text was added before, capitals and punctuation aside."""
        return normalised(text) in self._seen

    def near(self, text: str) -> bool:
        """Whether a text was added before that shares at least ``threshold`` with this one."""
        if self._threshold is None:
            return False
        shingles = _shingles(normalised(text))
        candidates = {index for band in _bands(shingles) for index in self._bands.get(band, ())}
        return any(jaccard(shingles, self._shingles[k]) >= self._threshold for k in candidates)

    def add(self, text: str) -> None:
        """Remembers a text."""
        plain = normalised(text)
        if plain in self._seen:
            return
        self._seen.add(plain)
        if self._threshold is not None:
            shingles = _shingles(plain)
            for band in _bands(shingles):
                self._bands.setdefault(band, []).append(len(self._shingles))
            self._shingles.append(shingles)


def normalised(text: str) -> str:
    """Lower case, letters and digits of any script, single spaces."""
    return " ".join(re.findall(r"\w+", text.casefold())) or " ".join(text.split())


def jaccard(one: Hashes, other: Hashes) -> float:
    """Share of common elements of two sets, each a sorted array."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _shingles(text: str) -> Hashes:
    pieces = {text[k : k + _SHINGLE] for k in range(max(len(text) - _SHINGLE, 0) + 1)}
    # Python's own hash of a string differs from process to process.
    codes = [hashlib.blake2b(p.encode("utf-8", "surrogatepass"), digest_size=8) for p in pieces]
    return np.sort(np.frombuffer(b"".join(code.digest() for code in codes), dtype="<u8"))


def _bands(shingles: Hashes) -> list[tuple[int, bytes]]:
    mixed = shingles[:, None] * _MULTIPLIERS
    minima = (mixed ^ (mixed >> np.uint64(29))).min(axis=0).reshape(_BANDS, _ROWS)
    return [(number, row.tobytes()) for number, row in enumerate(minima)]
