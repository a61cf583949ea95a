"""Which scores are of the target: heads are padded or cut, and assistants have their own."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fusion_detox.errors import VocabularyError

logger = logging.getLogger(__name__)
_PADDING = 2048
"""Columns that a head may have beyond its tokenizer (phi-2 has 943)."""


class TargetColumns:
    """The widths that scores of a target may have.

    Args:
        mapped: ``(tokens,)`` which tokens the calibrator can judge.
        assistant: Tokens of the assistant's tokenizer, 0 without.
    """

    def __init__(self, mapped: Tensor, assistant: int) -> None:
        self._tokens = len(mapped)
        self._narrowest = int(mapped.nonzero().max()) + 1
        self._assistant = assistant
        self._warned = False

    def hold(self, scores: Tensor) -> bool:
        """Whether scores can be of the target; those of another vocabulary pass.

        Raises:
            VocabularyError: They are far wider than the tokenizer's vocabulary.
        """
        width, widest = scores.shape[-1], _padded(self._tokens)
        if self._narrowest <= width <= widest:
            return True
        if width <= _padded(self._assistant):  # some of its columns may be cut off
            return False
        if width > widest:
            raise VocabularyError(
                f"scores have {width} columns, but the tokenizer given has {self._tokens} tokens: "
                "give the tokenizer of the model that generates; where they are drafts of an "
                "assistant with a vocabulary of its own, give assistant_tokenizer too"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "scores have %d columns, but the target's tokenizer has %d tokens: they belong to "
                "another model and are passed on unchanged. Where it is an assistant with a "
                "vocabulary of its own, give assistant_tokenizer",
                width,
                self._narrowest,
            )
        return False


def fit(tensor: Tensor, width: int) -> Tensor:
    """Zeros for columns that the tensor lacks, or without those that the scores lack."""
    missing = width - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _padded(tokens: int) -> int:
    """Widest head of a model with so many tokens."""
    return tokens + max(_PADDING, tokens // 20) if tokens else 0
