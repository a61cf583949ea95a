"""How varied samples are, and how many are no text at all.

Words here are runs of letters, digits and apostrophes, and each other mark by itself, in lower case
(:func:`words`). In scripts without spaces a run between marks counts as one word, so that numbers
are comparable between settings of one language only. All of these numbers depend on how much was
sampled: compare settings with the same prompts, samples and length.
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
# Shorter texts are not enough to call anything repetition or no text.
_FEWEST_WORDS, _FEWEST_CHARACTERS = 6, 10
_MOST_OF = 0.5


def words(text: str) -> list[str]:
    """Words and marks of a text, in lower case: ``"Don't!"`` is ``["don't", "!"]``."""
    return _WORD.findall(text.lower())


def distinct(sequences: Sequence[Sequence[Hashable]], size: int) -> float | None:
    """Different n-grams as a share of all n-grams, over all sequences together (dist-n).

    Li et al. 2016 (arXiv 1510.03055). The more text, the lower it is.

    Args:
        sequences: Words or token ids of each sample; n-grams do not reach over their borders.
        size: ``n``, at least 1.

    Returns:
        ``None`` if no sequence is ``size`` long.

    Raises:
        DataError: ``size`` is below 1.
    """
    if size < 1:
        raise DataError(f"n-grams have at least 1 word, not {size}")
    grams = Counter(chain.from_iterable(_grams(sequence, size) for sequence in sequences))
    return len(grams) / grams.total() if grams else None


def self_bleu(samples: Sequence[str]) -> float | None:
    """How much the samples of one prompt resemble each other, 0..1 (1: all the same).

    Mean over samples of sentence BLEU-4 against the others (Zhu et al. 2018, Texygen, arXiv
    1802.01886), by sacrebleu: exponential smoothing, and for samples of fewer than
    four words the orders that they have. It grows with the number of samples.

    Args:
        samples: Continuations of one prompt; those without a word are left out.

    Returns:
        ``None`` for fewer than two samples with words.

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
    # Its geometric mean of four ones is 100.00000000000004.
    return min(float(np.mean(scores)) / 100.0, 1.0)


def repeats(text: str, size: int = 4) -> bool:
    """Whether an n-gram of words occurs again; texts of up to ``size`` words cannot repeat one."""
    grams = _grams(words(text), size)
    return len(set(grams)) < len(grams)


def degenerate(text: str) -> str:
    """Why a text is no text that anyone would read, or an empty string if it is one.

    ``"empty"``: nothing but white space. ``"one word"``: of at least 6 words (marks do not count)
    one makes up more than half. ``"one character"``: of at least 10 characters other than white
    space one makes up more than half. ``"few letters"``: of at least 10 such characters fewer than
    half are letters or the marks that belong to letters, of any script. Shorter texts pass, as a
    single word, a number or a full stop may well end a sentence.
    """
    visible = "".join(text.split())
    if not visible:
        return "empty"
    found = [word for word in words(text) if word[0].isalnum()]
    if len(found) >= _FEWEST_WORDS and _largest(found) > _MOST_OF * len(found):
        return "one word"
    if len(visible) < _FEWEST_CHARACTERS:
        return ""
    if _largest(visible) > _MOST_OF * len(visible):
        return "one character"
    letters = sum(unicodedata.category(character)[0] in "LM" for character in visible)
    return "few letters" if letters < _MOST_OF * len(visible) else ""


def diversity(
    samples: Sequence[Sequence[str]], tokens: Sequence[Sequence[int]]
) -> dict[str, float | None]:
    """All of it for a setting, as ``results.json`` holds it.

    Args:
        samples: The continuations of each prompt.
        tokens: How many tokens each of them has, in the target's tokenizer.

    Returns:
        ``dist_1``, ``dist_2``, ``dist_3`` over the words of all samples; ``self_bleu``, the mean
        over prompts with at least two samples that have words; ``repetition``, the share of
        samples that repeat a 4-gram of words, where samples of four words and less count as not
        repeating; ``empty`` and ``degenerate`` (which includes empty) shares of samples;
        ``tokens``, the mean a sample. ``None`` for what does not exist.

    Raises:
        DataError: There are no samples, or not as many counts as samples.
        MissingExtraError: sacrebleu is not installed.
    """
    if [len(prompt) for prompt in samples] != [len(prompt) for prompt in tokens]:
        raise DataError(
            f"samples of {len(samples)} prompts and token counts of {len(tokens)} do not belong "
            "together; give one count a sample"
        )
    texts = [text for prompt in samples for text in prompt]
    if not texts:
        raise DataError("there are no samples to measure the diversity of")
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
