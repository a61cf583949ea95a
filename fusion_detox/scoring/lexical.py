"""A linear toxicity classifier over hashed character n-grams and words.

It scores the demo's output and is one of the benchmarks' two scorers. It needs numpy only, was
trained on human labels only, and was not used to select any model's training text.
``lexical.json``, next to the weights, names the data and the AUCs. Hashing follows Weinberger et
al. 2009, without signs because each bucket has an inverse document frequency.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_detox.errors import DataFileError, ModelError

CHARACTER_BUCKETS = 1 << 17
WORD_BUCKETS = 1 << 16
CHARACTER_SIZES = range(2, 6)
_WEIGHTS = Path(__file__).with_name("lexical.safetensors")
# Without smoothing, a single full stop would weigh as much as a sentence.
_NORM_SMOOTHING = 400.0
# Some corpora write " ." and others "."; the difference must not affect the score.
_SPACE_BEFORE_MARK = re.compile(r"(?<!\s)\s+([.,!?;:])")
_WORD = re.compile(r"\w+(?:['’*@$!]+\w+)*")


@lru_cache(maxsize=1 << 16)
def _characters(token: str) -> tuple[int, ...]:
    """Buckets of the character n-grams of one whitespace-separated token."""
    padded = f" {token} "
    return tuple(
        zlib.crc32(padded[start : start + size].encode()) % CHARACTER_BUCKETS
        for size in CHARACTER_SIZES
        for start in range(max(len(padded) - size + 1, 1))
    )


@lru_cache(maxsize=1 << 16)
def _word(words: str) -> int:
    return CHARACTER_BUCKETS + zlib.crc32(b"w" + words.encode()) % WORD_BUCKETS


def hashed_features(text: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The buckets that occur in a text, ascending, and ``1 + log(count)`` of each.

    Character n-grams lie below ``CHARACTER_BUCKETS``, words and word bigrams above.
    """
    # "ignore": lone surrogates cannot be encoded.
    text = text.lower().encode("utf-8", "ignore").decode("utf-8")
    text = _SPACE_BEFORE_MARK.sub(r"\1", text).strip()
    found = [bucket for token in text.split() for bucket in _characters(token)]
    words = _WORD.findall(text)
    found += [_word(word) for word in words]
    found += [_word(f"{left} {right}") for left, right in pairwise(words)]
    buckets, counts = np.unique(np.array(found, dtype=np.int64), return_counts=True)
    return buckets, (1.0 + np.log(counts)).astype(np.float32)


def weighted_features(
    text: str, idf: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The features of a text times ``idf``; the character and word parts each have norm below 1."""
    buckets, values = hashed_features(text)
    values = values * idf[buckets]
    split = int(np.searchsorted(buckets, CHARACTER_BUCKETS))
    for part in (values[:split], values[split:]):
        if part.size:
            part /= np.sqrt(float(part @ part) + _NORM_SMOOTHING)
    return buckets, values


class LexicalScorer:
    """Probability that people would call a text toxic, from its words and spelling.

    It misses toxicity without toxic words, and it ignores whom a text is about.
    """

    name = "lexical"

    def __init__(self, weights: NDArray[np.float32], idf: NDArray[np.float32], bias: float) -> None:
        if not weights.shape == idf.shape == (CHARACTER_BUCKETS + WORD_BUCKETS,):
            raise ModelError(
                f"weights {weights.shape} and idf {idf.shape} of the lexical scorer must both "
                f"have shape ({CHARACTER_BUCKETS + WORD_BUCKETS},); retrain it with "
                "benchmarks/train_scorers.py"
            )
        self.weights, self.idf, self.bias = weights, idf, bias

    @classmethod
    def load(cls) -> LexicalScorer:
        """Loads the scorer that is included in the package.

        Raises:
            DataFileError: Its weights are missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(_WEIGHTS)
            return cls(
                tensors["weights"].astype(np.float32) * tensors["weights_scale"],
                tensors["idf"].astype(np.float32) * tensors["idf_scale"],
                float(tensors["bias"][0]),
            )
        except (OSError, SafetensorError, KeyError) as error:
            raise DataFileError(
                f"cannot read the lexical scorer's weights at {_WEIGHTS}: {error}; "
                "reinstall the package"
            ) from error

    @classmethod
    def record(cls) -> dict[str, Any]:
        """Training data, licences and measured AUCs of the shipped scorer."""
        record: dict[str, Any] = json.loads(_WEIGHTS.with_suffix(".json").read_text("utf-8"))
        weights = hashlib.sha256(_WEIGHTS.read_bytes()).hexdigest()[:12]
        return {**record, "weights": weights, "licence": "Apache-2.0", "truncation": "none"}

    def score(self, texts: Sequence[str]) -> list[float]:
        """Toxicity of each text, from 0 to 1; 0 for a blank text."""
        return [self._score(text) for text in texts]

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """Scores for ``"toxicity"``, its only type."""
        return {"toxicity": self.score(texts)}

    def _score(self, text: str) -> float:
        buckets, values = weighted_features(text, self.idf)
        if not buckets.size:
            return 0.0
        logit = float(values @ self.weights[buckets]) + self.bias
        return float(1.0 / (1.0 + np.exp(-np.clip(logit, -60.0, 60.0))))
