"""Checks that scores match the target's vocabulary: heads are padded, and assistants differ."""

from __future__ import annotations

import logging

from torch import Tensor

from fusion_detox.errors import VocabularyError

logger = logging.getLogger(__name__)
_PADDING = 2048
"""Columns that a head may have beyond its tokenizer (phi-2 has 943)."""


class TargetColumns:
    """The widths that a target's scores may have.

    Args:
        mapped: ``(tokens,)`` bool, the tokens that the vocabulary map reaches.
        assistant: Number of tokens of the assistant's tokenizer; 0 without an assistant.
    """

    def __init__(self, mapped: Tensor, assistant: int) -> None:
        self._tokens = len(mapped)
        self._narrowest = int(mapped.nonzero().max()) + 1
        self._assistant = assistant
        self._warned = False

    def match(self, width: int) -> bool:
        """Whether scores with this many columns can be the target's.

        Scores of another vocabulary, such as an assistant's drafts, are passed on unchanged.

        Raises:
            VocabularyError: They are far wider than the tokenizer's vocabulary.
        """
        widest = _max_width(self._tokens)
        if self._narrowest <= width <= widest:
            return True
        if width <= _max_width(self._assistant):  # some of its columns may be cut off
            return False
        if width > widest:
            raise VocabularyError(
                f"scores have {width} columns, but the tokenizer has {self._tokens} tokens. Pass "
                "the tokenizer of the model that generates. If the scores are drafts of an "
                "assistant with its own vocabulary, pass assistant_tokenizer too"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "scores have %d columns, but the target's tokenizer has %d tokens. They belong to "
                "another model and are passed on unchanged. If that model is an assistant with its "
                "own vocabulary, pass assistant_tokenizer",
                width,
                self._narrowest,
            )
        return False


def _max_width(tokens: int) -> int:
    """Widest head of a model with this many tokens."""
    return tokens + max(_PADDING, tokens // 20) if tokens else 0
