"""A common baseline: banning the words of a list, in several spellings."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from fusion_detox.errors import DataError, DataFileError, MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_word_list(path: Path | None = None) -> tuple[list[str], dict[str, Any]]:
    """The words to ban, and facts about the list for the report.

    Args:
        path: A text file with one word or phrase per line; by default, the list of the package
            ``better-profanity``, which is read as text.

    Raises:
        DataFileError: The file cannot be read.
        DataError: The file is not UTF-8 or holds no words.
        MissingExtraError: ``better-profanity`` is not installed.
    """
    if path is None:
        name, content = _public_list()
    else:
        try:
            name, content = path.name, path.read_bytes()
        except OSError as error:
            raise DataFileError(f"cannot read the word list {path}: {error.strerror}") from error
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"the word list {name} is not UTF-8; convert it with iconv") from error
    words = sorted({line.strip() for line in lines} - {""})
    if not words:
        raise DataError(f"the word list {name} holds no words; write one per line")
    sha256 = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
    return words, {"list": name, "words": len(words), "sha256": sha256}


def tokenisations(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> list[list[int]]:
    """Token ids of each word as given, lower, Capital and UPPER, with and without a leading space.

    A single spelling would miss most of a vocabulary's tokens for a word.
    """
    spellings = {
        before + form
        for word in words
        for form in (word, word.lower(), word.capitalize(), word.upper())
        for before in ("", " ")
    }
    encoded: Any = tokenizer(sorted(spellings), add_special_tokens=False)["input_ids"]
    return [list(ids) for ids in sorted({tuple(ids) for ids in encoded if ids})]


class WordFilter(LogitsProcessor):
    """Bans every token that would complete a banned sequence.

    Its results equal those of ``NoBadWordsLogitsProcessor`` (a test compares them), which scans all
    sequences at every step and takes seconds per step for thousands of sequences.

    Args:
        sequences: Token ids to ban; see :func:`tokenisations`.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._completing: dict[tuple[int, ...], list[int]] = {}
        for ids in sequences:
            self._completing.setdefault(tuple(ids[:-1]), []).append(ids[-1])
        self._lengths = sorted({len(prefix) for prefix in self._completing})

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A copy of the scores, ``(batch, vocab)``, with ``-inf`` for banned tokens."""
        longest = max(self._lengths, default=0)
        rows: list[int] = []
        tokens: list[int] = []
        for row, ids in enumerate(input_ids[:, max(input_ids.shape[1] - longest, 0) :].tolist()):
            for length in self._lengths:
                if length <= len(ids):
                    banned = self._completing.get(tuple(ids[len(ids) - length :]), ())
                    rows += [row] * len(banned)
                    tokens += banned
        filtered = scores.clone()
        filtered[rows, tokens] = -torch.inf
        return filtered


def _public_list() -> tuple[str, bytes]:
    try:
        files = importlib.metadata.files("better-profanity") or []
        version = importlib.metadata.version("better-profanity")
        path = next(file for file in files if file.name == "profanity_wordlist.txt")
        return f"better-profanity {version}", Path(str(path.locate())).read_bytes()
    except (importlib.metadata.PackageNotFoundError, StopIteration, OSError) as error:
        raise MissingExtraError("better-profanity", "evaluate") from error
