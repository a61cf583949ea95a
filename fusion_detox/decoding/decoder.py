"""The interface of a decoder, which runs a calibrator's models on rows of the KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from fusion_detox.decoding.kv_cache import Row


class Decoder(ABC):
    """Logits, or last hidden states, of one or two models at the ends of texts in slots.

    Attributes:
        distributions: Number of models.
    """

    distributions: int

    @abstractmethod
    def resize(self, slots: int) -> None:
        """Changes the number of slots; the first ones keep what they hold."""

    @abstractmethod
    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copies the columns ``start`` to ``stop`` of one slot to another."""

    @abstractmethod
    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Runs the rows' tokens in one forward pass and fills their columns.

        Args:
            rows: At least one row; each has its own slot.

        Returns:
            ``(distributions, asked, vocab)``: the asked positions of the first row, then those
            of the second, and so on. The next call may overwrite it.
        """

    @abstractmethod
    def hidden(self, rows: Sequence[Row]) -> Tensor:
        """The same, but returns the output layer's inputs instead of logits.

        Returns:
            ``(distributions, asked, width)`` last hidden states, after the final norm.
        """
