"""Semantic similarity of continuations to their prompts and to the unfused target's continuations.

The metric is the cosine similarity of sentence embeddings (Reimers and Gurevych 2019, arXiv
1908.10084). A fused continuation is compared with the base's for the same prompt, sample and seed,
which was sampled with the same noise. The metric shows whether a method lowers toxicity by changing
the subject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_detox.errors import DataError, ModelError
from fusion_detox.evaluation.metrics.statistics import Floats, Resamples, mean_interval

Embed = Callable[[Sequence[str]], NDArray[Any]]
"""Maps ``n`` texts to an ``(n, d)`` array."""

# Number of prompts whose embeddings are in memory at the same time.
_BLOCK = 512


class Remembered:
    """An ``Embed`` that caches the vectors of texts that many comparisons share.

    Args:
        embed: Computes the vectors.
        kept: The texts to cache. Surrounding white space is ignored.
    """

    def __init__(self, embed: Embed, kept: Iterable[str]) -> None:
        self._embed, self._kept = embed, {text.strip() for text in kept}
        self._vectors: dict[str, NDArray[Any]] = {}

    def __call__(self, texts: Sequence[str]) -> NDArray[Any]:
        """Vectors ``(n, d)`` of ``n`` different texts."""
        new = [text for text in texts if text not in self._vectors]
        found = dict(zip(new, self._embed(new), strict=True)) if new else {}
        self._vectors |= {text: found[text] for text in found.keys() & self._kept}
        return np.stack([found[text] if text in found else self._vectors[text] for text in texts])


def similarity(
    prompts: Sequence[str],
    samples: Sequence[Sequence[str]],
    embed: Embed,
    draws: Resamples,
    *,
    model: str,
    base: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Similarity of a setting's continuations to their prompts and to the base's continuations.

    Args:
        prompts: The prompts.
        samples: The continuations of each prompt, over all seeds.
        embed: Computes embeddings of any norm. It receives distinct, non-empty texts.
        draws: Resamples of the same number of prompts.
        model: Name of the embedding model, for the results.
        base: The base's continuations, in the order of ``samples``.

    Returns:
        ``model``; ``to_prompt`` and ``to_base`` (``None`` without ``base``), the means over prompts
        of the mean over samples, with intervals; and ``left_out``, the number of samples that
        each of them leaves out because a text of the pair is empty or its embedding is 0.

    Raises:
        DataError: The numbers of prompts or samples differ.
        ModelError: ``embed`` does not return one finite vector per text.
    """
    for name, texts in (("samples", samples), ("base", base)):
        if texts is not None and len(texts) != len(prompts):
            raise DataError(
                f"{name} has continuations of {len(texts)} prompts, but there are {len(prompts)} "
                "prompts; give the continuations of each prompt"
            )
    repeated = [[prompt] * len(new) for prompt, new in zip(prompts, samples, strict=True)]
    ours = cosines(repeated, samples, embed)
    theirs = None if base is None else cosines(base, samples, embed)
    return {
        "model": model,
        "to_prompt": mean_interval(_means(ours), draws),
        "to_base": None if theirs is None else mean_interval(_means(theirs), draws),
        "left_out": {
            "to_prompt": _missing(ours),
            "to_base": None if theirs is None else _missing(theirs),
        },
    }


def cosines(
    one: Sequence[Sequence[str]], other: Sequence[Sequence[str]], embed: Embed
) -> list[Floats]:
    """Cosine of each pair of texts, by prompt; nan if a text is empty or its embedding is 0.

    Raises:
        DataError: The numbers of texts differ.
        ModelError: See :func:`similarity`.
    """
    if [len(texts) for texts in one] != [len(texts) for texts in other]:
        raise DataError(
            "the two settings differ in prompts or in the number of samples of a prompt, so their "
            "continuations cannot be paired; compare settings with the same sampling"
        )
    found: list[Floats] = []
    for start in range(0, len(one), _BLOCK):
        block = slice(start, start + _BLOCK)
        pairs = [
            list(zip(*rows, strict=True)) for rows in zip(one[block], other[block], strict=True)
        ]
        flat = [text.strip() for prompt in pairs for pair in prompt for text in pair]
        units, index = _units(flat, embed)
        rows = np.array([index.get(text, -1) for text in flat], dtype=np.int64).reshape(-1, 2)
        values = np.einsum("ij,ij->i", units[rows[:, 0]], units[rows[:, 1]])
        values = np.where((rows < 0).any(1), np.nan, np.clip(values, -1.0, 1.0))
        cuts = np.cumsum([len(prompt) for prompt in pairs])[:-1]
        found += np.split(values, cuts)
    return found


def _units(texts: Sequence[str], embed: Embed) -> tuple[Floats, dict[str, int]]:
    """Unit vectors of the distinct texts, and the row of each text whose embedding is not 0."""
    different = [text for text in dict.fromkeys(texts) if text]
    if not different:
        return np.zeros((1, 1)), {}
    vectors = np.asarray(embed(different), dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(different) or not np.isfinite(vectors).all():
        raise ModelError(
            f"embeddings of {len(different)} texts have shape {vectors.shape} or are not finite; "
            "one finite vector per text is needed, so use another model"
        )
    norms = np.linalg.norm(vectors, axis=1)
    index = {text: row for row, text in enumerate(different) if norms[row] > 0}
    return vectors / np.where(norms > 0, norms, 1.0)[:, None], index


def _means(values: Sequence[Floats]) -> Floats:
    """Mean over each prompt's pairs; nan if there are none."""
    known = [prompt[~np.isnan(prompt)] for prompt in values]
    return np.array([prompt.mean() if prompt.size else np.nan for prompt in known])


def _missing(values: Sequence[Floats]) -> int:
    return sum(int(np.isnan(prompt).sum()) for prompt in values)
