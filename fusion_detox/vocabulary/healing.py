"""Token healing: continuing a calibrator token that the text's end cuts in two."""

from __future__ import annotations

import functools
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_detox.vocabulary.token_table import ByteIndex, TokenTable

_MAX_TABLES = 2048


class Healing(NamedTuple):
    """The calibrator tokens that continue given bytes, and what they imply for the target.

    Attributes:
        tokens: ``(tokens,)`` calibrator ids.
        following: ``(tokens,)`` the next target token in each of them.
        owners: ``(pairs,)`` index into ``tokens``.
        prefixes: ``(pairs,)`` target ids that the rest of the owner starts with.
    """

    tokens: Tensor
    following: Tensor
    owners: Tensor
    prefixes: Tensor


class HealingTables:
    """Healing tables by remainder, built on first use; the most recently used ones are kept.

    ``table(remainder)`` is the table of the calibrator tokens that start with the remainder and are
    longer.

    Args:
        token_bytes: The calibrator's token bytes by id.
        byte_ids: The calibrator's ``<0xNN>`` tokens.
        target: The target's token table.
        split_ptr: ``(V_C + 1,)`` where each calibrator token's ids begin in ``split_ids``.
        split_ids: The target's tokenisation of all calibrator tokens.
    """

    def __init__(
        self,
        token_bytes: tuple[bytes | None, ...],
        byte_ids: frozenset[int],
        target: TokenTable,
        split_ptr: Tensor,
        split_ids: Tensor,
    ) -> None:
        self._token_bytes, self._byte_ids, self._target = token_bytes, byte_ids, target
        self._split_ptr, self._split_ids = split_ptr, split_ids
        self._indices: tuple[ByteIndex, ByteIndex] | None = None
        self.table = functools.lru_cache(_MAX_TABLES)(self._build)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.table = functools.lru_cache(_MAX_TABLES)(self._build)

    def _build(self, remainder: bytes) -> Healing:
        # No lock: two threads may do the same work once, but a forked child never waits.
        if self._indices is None:
            self._indices = (
                ByteIndex(self._token_bytes, self._byte_ids),
                ByteIndex(self._target.token_bytes, self._target.byte_ids),
            )
        own, target = self._indices
        tokens, following, owners, prefixes = array("q"), array("q"), array("q"), array("q")
        for text in own.extensions(remainder):
            rest = text[len(remainder) :]
            for j in own.all_ids(text):
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

        ``None`` if the target's tokenisation of ``j`` has no boundary there: the target would not
        have ended a token at that point, so the text cannot end inside ``j``. If the target has no
        tokenisation of ``j``, it is the longest target token that fits.
        """
        begin, end = self._split_ptr[j : j + 2].tolist()
        if begin == end:
            return target.longest_prefix(rest)
        for i in self._split_ids[begin:end].tolist():
            if left <= 0:
                return int(i) if left == 0 else None
            left -= len(self._target.token_bytes[i] or b"")
        return None
