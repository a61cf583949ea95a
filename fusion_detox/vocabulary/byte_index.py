"""Looking tokens up by their bytes."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from itertools import chain


@dataclasses.dataclass(frozen=True)
class ByteIndex:
    """Tokens to look up by their bytes.

    Attributes:
        ids: The id of given bytes, a normal piece before its ``<0xNN>`` twin.
        twins: Further ids of the same bytes.
        sorted: All bytes in order, so that those with a common prefix lie side by side.
        longest: Length of the longest token, by its first byte.
    """

    ids: dict[bytes, int]
    twins: dict[bytes, list[int]]
    sorted: list[bytes]
    longest: list[int]

    @classmethod
    def of(cls, pieces: tuple[bytes | None, ...], byte_ids: frozenset[int]) -> ByteIndex:
        """Indexes the pieces of a table."""
        ids: dict[bytes, int] = {}
        twins: dict[bytes, list[int]] = {}
        normal = [i for i in range(len(pieces)) if i not in byte_ids]
        for i in chain(normal, sorted(i for i in byte_ids if i < len(pieces))):
            piece = pieces[i]
            if piece is not None and ids.setdefault(piece, i) != i:
                twins.setdefault(piece, []).append(i)
        longest = [0] * 256
        for piece in ids:
            longest[piece[0]] = max(longest[piece[0]], len(piece))
        return cls(ids, twins, sorted(ids), longest)

    def extending(self, prefix: bytes) -> list[bytes]:
        """All tokens' bytes that start with the prefix and are longer."""
        start = bisect_left(self.sorted, prefix)
        stop = bisect_left(self.sorted, prefix + b"\xff" * (self.longest[prefix[0]] + 1), start)
        return [piece for piece in self.sorted[start:stop] if piece != prefix]

    def prefixes(self, text: bytes) -> list[int]:
        """Ids, twins included, of all tokens that the text starts with."""
        found: list[int] = []
        for length in range(1, min(len(text), self.longest[text[0]]) + 1):
            piece = text[:length]
            if (i := self.ids.get(piece)) is not None:
                found.append(i)
                found.extend(self.twins.get(piece, ()))
        return found

    def longest_prefix(self, text: bytes) -> int | None:
        """The longest token that the text starts with."""
        for length in range(min(len(text), self.longest[text[0]]), 0, -1):
            if (i := self.ids.get(text[:length])) is not None:
                return i
        return None

    def greedy(self, text: bytes) -> tuple[int, ...] | None:
        """The text as longest tokens from left to right, or ``None`` where none fits."""
        path: list[int] = []
        start = 0
        while start < len(text):
            for length in range(min(len(text) - start, self.longest[text[start]]), 0, -1):
                if (i := self.ids.get(text[start : start + length])) is not None:
                    path.append(i)
                    start += length
                    break
            else:
                return None
        return tuple(path)
