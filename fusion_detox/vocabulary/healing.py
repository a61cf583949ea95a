"""Healing: what continues a calibrator token in the middle of which the text ends."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_detox.vocabulary.byte_index import ByteIndex
from fusion_detox.vocabulary.token_table import TokenTable

_MOST_TABLES = 2048


class Healing(NamedTuple):
    """What the calibrator tokens that continue given bytes say about the next target token.

    Attributes:
        tokens: ``(tokens,)`` calibrator ids.
        following: ``(tokens,)`` the target token that comes next in each of them.
        owners: ``(pairs,)`` index into ``tokens``.
        prefixes: ``(pairs,)`` target ids that the rest of the owner starts with.
    """

    tokens: Tensor
    following: Tensor
    owners: Tensor
    prefixes: Tensor


class HealingTables:
    """Tables by remainder, built on first use; the most recent ones are kept.

    Args:
        pieces: The calibrator's pieces by id.
        byte_ids: Its ``<0xNN>`` tokens.
        target: The target's table.
        split_ptr: ``(V_C + 1,)`` where in ``split_ids`` each calibrator token's ids begin.
        split_ids: The target's own tokenisation of all calibrator tokens.
    """

    def __init__(
        self,
        pieces: tuple[bytes | None, ...],
        byte_ids: frozenset[int],
        target: TokenTable,
        split_ptr: Tensor,
        split_ids: Tensor,
    ) -> None:
        self._token_bytes, self._byte_ids, self._target = pieces, byte_ids, target
        self._split_ptr, self._split_ids = split_ptr, split_ids
        self._indices: tuple[ByteIndex, ByteIndex] | None = None
        self._tables: OrderedDict[bytes, Healing] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def of(self, remainder: bytes) -> Healing:
        """The table of the calibrator tokens that start with the remainder and are longer."""
        with self._lock:
            table = self._tables.get(remainder)
            if table is not None:
                self._tables.move_to_end(remainder)
                return table
            table = self._tables[remainder] = self._build(remainder)
            if len(self._tables) > _MOST_TABLES:
                self._tables.popitem(last=False)
            return table

    def _build(self, remainder: bytes) -> Healing:
        if self._indices is None:
            self._indices = (
                ByteIndex.of(self._token_bytes, self._byte_ids),
                ByteIndex.of(self._target.token_bytes, self._target.byte_ids),
            )
        own, target = self._indices
        tokens, following, owners, prefixes = array("q"), array("q"), array("q"), array("q")
        for piece in own.extending(remainder):
            rest = piece[len(remainder) :]
            for j in (own.ids[piece], *own.twins.get(piece, ())):
                following_id = self._following(j, len(remainder), rest, target)
                if following_id is not None:
                    found = target.prefixes(rest)
                    owners.extend([len(tokens)] * len(found))
                    prefixes.extend(found)
                    tokens.append(j)
                    following.append(following_id)
        columns = (tokens, following, owners, prefixes)
        return Healing(*(torch.tensor(column, dtype=torch.long) for column in columns))

    def _following(self, j: int, left: int, rest: bytes, target: ByteIndex) -> int | None:
        """The target token that begins after ``left`` bytes of calibrator token ``j``.

        ``None`` where the target's tokenisation of ``j`` has no boundary there: the target would
        not have ended a token then, so the text is not on its way to ``j``. Where it has no
        tokenisation of ``j``, the longest target token that fits.
        """
        begin, end = self._split_ptr[j : j + 2].tolist()
        if begin == end:
            return target.longest_prefix(rest)
        for i in self._split_ids[begin:end].tolist():
            if left <= 0:
                return int(i) if left == 0 else None
            left -= len(self._target.token_bytes[i] or b"")
        return None
