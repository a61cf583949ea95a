"""The KV cache: slots that hold the keys and values of texts, and rows of work on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Slots grow by this many columns.
_COLUMNS = 32


class Row(NamedTuple):
    """Work to do on one slot.

    Attributes:
        slot: The slot's number.
        start: Number of leading columns that are already correct; may be 0.
        tokens: Ids for the columns from ``start`` on; at least one.
        asked: Ascending offsets into ``tokens`` whose next token is asked for.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    asked: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Number of filled columns afterwards."""
        return self.start + len(self.tokens)


class SlotStore:
    """Keys and values of many texts, one slot each; a token's column is its position.

    A text can be shortened without any change here, since columns beyond its end are masked.

    Args:
        shapes: For each layer, ``(heads, head_dim)`` of its keys and of its values.
        longest: Longest text in tokens.
        device: Where to keep them.
        dtype: Dtype of keys and values.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[tuple[int, int], tuple[int, int]]],
        longest: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.longest = longest

        def empty(shape: tuple[int, int]) -> Tensor:
            return torch.zeros(0, min(_COLUMNS, longest), *shape, device=device, dtype=dtype)

        # By layer, (slots, columns, heads, head_dim).
        self.keys = [empty(keys) for keys, _ in shapes]
        self.values = [empty(values) for _, values in shapes]

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self.keys[0])

    @property
    def columns(self) -> int:
        """Number of columns of each slot so far."""
        return self.keys[0].shape[1]

    def resize(self, slots: int) -> None:
        """Changes the number of slots; the first ones keep what they hold."""
        self._reshape(slots, self.columns if slots else min(_COLUMNS, self.longest))

    def reserve(self, columns: int) -> None:
        """Makes room for texts of this length, since most are far shorter than the longest."""
        if columns > self.columns:
            more = -(-columns // _COLUMNS) * _COLUMNS
            self._reshape(self.slots, min(self.longest, more))

    def _reshape(self, slots: int, columns: int) -> None:
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                # Zeros, because masked values are multiplied by 0, and 0 * NaN is NaN.
                new = old.new_zeros(slots, columns, *old.shape[2:])
                kept, filled = min(slots, len(old)), min(columns, old.shape[1])
                new[:kept, :filled] = old[:kept, :filled]
                tensors[layer] = new

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copies the columns ``start`` to ``stop`` of one slot to another."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, start:stop] = tensor[source, start:stop]

    def write(self, layer: int, where: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores new columns.

        Args:
            layer: The layer's number.
            where: ``(tokens,)`` of ``slot * columns + column``.
            keys: ``(tokens, heads, head_dim)``.
            values: The same shape.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, where, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, where, values)
