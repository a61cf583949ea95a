"""Diversity of samples, and the share of samples that are degenerate.

Words are lower-case runs of letters, digits and apostrophes, and single punctuation marks
(:func:`words`). In scripts without spaces, a run between marks counts as one word, so numbers are
comparable only within one language. All numbers depend on the amount of text: compare settings with
the same prompts, samples and length.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from fusion_detox.errors import DataError, MissingExtraError

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
# Shorter texts never count as degenerate.
_MIN_WORDS, _MIN_CHARACTERS = 6, 10
_MAJORITY = 0.5


def words(text: str) -> list[str]:
    """Words and punctuation marks in lower case: ``"Don't!"`` gives ``["don't", "!"]``."""
    return _WORD.findall(text.lower())


def distinct(sequences: Sequence[Sequence[Hashable]], size: int) -> float | None:
    """Distinct n-grams as a share of all n-grams, over all sequences together (dist-n).

    Li et al. 2016 (arXiv 1510.03055). It falls as the amount of text grows.

    Args:
        sequences: Words or token ids of each sample; n-grams do not span two samples.
        size: ``n``, at least 1.

    Returns:
        The share, or ``None`` if no sequence has ``size`` items.

    Raises:
        DataError: ``size`` is below 1.
    """
    if size < 1:
        raise DataError(f"the size of n-grams must be at least 1, but is {size}")
    grams = Counter(chain.from_iterable(_grams(sequence, size) for sequence in sequences))
    return len(grams) / grams.total() if grams else None


def self_bleu(samples: Sequence[str]) -> float | None:
    """How similar the samples of one prompt are, from 0 to 1 (identical).

    The mean over samples of sentence BLEU-4 against the others (Zhu et al. 2018, Texygen, arXiv
    1802.01886), by sacrebleu with exponential smoothing and effective order. It grows with the
    number of samples.

    Args:
        samples: Continuations of one prompt; those without words are left out.

    Returns:
        The mean, or ``None`` for fewer than two samples with words.

    Raises:
        MissingExtraError: sacrebleu is not installed.
    """
    texts = [" ".join(found) for text in samples if (found := words(text))]
    if len(texts) < 2:
        return None
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingExtraError("sacrebleu", "evaluate") from error
    bleu = BLEU(effective_order=True, tokenize="none")
    scores = [
        bleu.sentence_score(text, texts[:index] + texts[index + 1 :]).score
        for index, text in enumerate(texts)
    ]
    # sacrebleu's geometric mean of four ones is 100.00000000000004.
    return min(float(np.mean(scores)) / 100.0, 1.0)


def repeats(text: str, size: int = 4) -> bool:
    """Whether an n-gram of ``size`` words occurs more than once."""
    grams = _grams(words(text), size)
    return len(set(grams)) < len(grams)


def degenerate(text: str) -> str:
    """Why a text is degenerate, or an empty string if it is not.

    - ``"empty"``: white space only.
    - ``"one word"``: one word makes up more than half of at least 6 words (punctuation does not
      count).
    - ``"one character"``: one character makes up more than half of at least 10 visible characters.
    - ``"few letters"``: fewer than half of at least 10 visible characters are letters or combining
      marks, of any script.

    Shorter texts pass, because a single word, number or full stop may end a sentence.
    """
    visible = "".join(text.split())
    if not visible:
        return "empty"
    found = [word for word in words(text) if word[0].isalnum()]
    if len(found) >= _MIN_WORDS and _largest(found) > _MAJORITY * len(found):
        return "one word"
    if len(visible) < _MIN_CHARACTERS:
        return ""
    if _largest(visible) > _MAJORITY * len(visible):
        return "one character"
    letters = sum(unicodedata.category(character)[0] in "LM" for character in visible)
    return "few letters" if letters < _MAJORITY * len(visible) else ""


def diversity(
    samples: Sequence[Sequence[str]], tokens: Sequence[Sequence[int]]
) -> dict[str, float | None]:
    """Diversity of a setting's samples, as in ``results.json``.

    Args:
        samples: The continuations of each prompt.
        tokens: The number of the target's tokens in each continuation.

    Returns:
        ``dist_1``, ``dist_2`` and ``dist_3`` over the words of all samples; ``self_bleu``, the mean
        over prompts with at least two samples that have words; ``repetition``, the share of samples
        that repeat a 4-gram of words; ``empty`` and ``degenerate`` (which includes empty), shares
        of samples; ``tokens``, the mean per sample. ``None`` if a value does not exist.

    Raises:
        DataError: There are no samples, or the numbers of counts and samples differ.
        MissingExtraError: sacrebleu is not installed.
    """
    if [len(prompt) for prompt in samples] != [len(prompt) for prompt in tokens]:
        raise DataError(
            f"samples of {len(samples)} prompts and token counts of {len(tokens)} do not "
            "match; give one count per sample"
        )
    texts = [text for prompt in samples for text in prompt]
    if not texts:
        raise DataError("there are no samples to measure the diversity of; give some")
    split = [words(text) for text in texts]
    alike = [value for prompt in samples if (value := self_bleu(prompt)) is not None]
    reasons = [degenerate(text) for text in texts]
    return {
        **{f"dist_{size}": distinct(split, size) for size in (1, 2, 3)},
        "self_bleu": _mean(alike),
        "repetition": _mean([repeats(text) for text in texts]),
        "empty": _mean([reason == "empty" for reason in reasons]),
        "degenerate": _mean([bool(reason) for reason in reasons]),
        "tokens": _mean([count for prompt in tokens for count in prompt]),
    }


def _grams(sequence: Sequence[Hashable], size: int) -> list[tuple[Hashable, ...]]:
    return [tuple(sequence[start : start + size]) for start in range(len(sequence) - size + 1)]


def _largest(items: Sequence[Hashable]) -> int:
    return Counter(items).most_common(1)[0][1]


def _mean(values: Sequence[Any]) -> float | None:
    return float(np.mean(values)) if values else None
