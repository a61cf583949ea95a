"""Which slot serves which text of a call, so that as little as possible is computed anew."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fusion_detox.decoding.decoder import Row

Ids = tuple[int, ...]

# A text that a slot holds beyond what a new one needs is given up if it is at most this long.
_EXPENDABLE = 16
_PARENTS = 4
# Slots that so many calls have not used are taken before the store grows.
_IDLE_CALLS = 8


class Path(NamedTuple):
    """A text to run, and its prefixes (by length) after which the next token is asked for."""

    text: Ids
    lengths: tuple[int, ...]


def split_into_paths(texts: Iterable[Ids]) -> list[Path]:
    """Texts without those that begin others, which become lengths asked for on the way."""
    paths: list[Path] = []
    # In this order a text comes right after those that it begins.
    for text in sorted(texts, reverse=True):
        if paths and paths[-1].text[: len(text)] == text:
            last = paths.pop()
            paths.append(Path(last.text, (len(text), *last.lengths)))
        else:
            paths.append(Path(text, (len(text),)))
    return paths


class Plan(NamedTuple):
    """What to do for the texts of a call.

    Attributes:
        rows: The work on each text's slot, in the order of the texts.
        copies: Source, target, first and last column, to be done before and in this order.
        texts: What each slot of ``rows`` holds once its work is done.
    """

    rows: list[Row]
    copies: list[tuple[int, int, int, int]]
    texts: dict[int, Ids]


class Planner:
    """Which slot holds which text, and which one serves a new text best."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._texts: list[Ids] = []  # () for an empty slot
        self._used: list[int] = []  # number of the call
        self._slot: dict[Ids, int] = {}
        self._call = 0

    def __len__(self) -> int:
        return len(self._texts)

    def hold(self, slot: int, text: Ids) -> None:
        """Note what a slot's columns hold."""
        old = self._texts[slot]
        if self._slot.get(old) == slot:
            del self._slot[old]
        self._texts[slot] = text
        if text:
            self._slot[text] = slot

    def plan(self, paths: Sequence[Path]) -> Plan:
        """A slot of its own for each text (at most ``most`` of them), and what to copy first.

        A text that extends another takes over its slot. Other texts take over the slot with the
        longest common prefix if little else is lost, or get a copy of that prefix. The slots are
        noted as holding only what is right before anything is done, in case it fails.
        """
        self._call += 1
        free = set(range(len(self)))
        found: dict[int, tuple[int, int]] = {}  # by index in paths: slot, and columns in it
        for index, (text, _) in enumerate(paths):
            for length in range(len(text), max(0, len(text) - _PARENTS - 1), -1):
                slot = self._slot.get(text[:length])
                if slot is not None and slot in free:
                    free.remove(slot)
                    found[index] = slot, length
                    break
        copies: list[tuple[int, int, int, int]] = []
        if len(found) < len(paths):
            self._search(paths, free, found, copies)
        safe = {target: start for _, target, start, _ in copies}
        rows, texts = [], {}
        for index, (text, lengths) in enumerate(paths):
            slot, start = found[index]
            start = min(start, lengths[0] - 1)
            asked = tuple(length - 1 - start for length in lengths)
            rows.append(Row(slot, start, text[start:], asked))
            old = self._texts[slot]
            whole = slot not in safe and old[: len(text)] == text
            texts[slot] = old if whole else text
            self.hold(slot, text[: min(start, safe.get(slot, start))])
            self._used[slot] = self._call
        return Plan(rows, copies, texts)

    def _search(
        self,
        paths: Sequence[Path],
        free: set[int],
        found: dict[int, tuple[int, int]],
        copies: list[tuple[int, int, int, int]],
    ) -> None:
        """Slots for the paths whose parents are not there, or go to a twin."""
        sources = sorted((text, slot) for slot, text in enumerate(self._texts) if text)
        targets = [pair for pair in sources if pair[1] in free]
        for index, (text, _) in enumerate(paths):
            if index in found:
                continue
            (_, source), common = _nearest(sources, text)
            (old, slot), kept = _nearest(targets, text)
            if kept == 0 or (kept < len(text) and len(old) - kept > _EXPENDABLE):
                slot = self._vacate(free, len(paths))
                old, kept = self._texts[slot], common if slot == source else 0
            free.remove(slot)
            if old:
                targets.remove((old, slot))
            if common > kept:
                copies.append((source, slot, kept, common))
                if old:  # no longer there to be copied
                    sources.remove((old, slot))
            found[index] = slot, max(common, kept)

    def _vacate(self, free: set[int], wanted: int) -> int:
        """An empty slot, or the one that was not used for longest."""
        empty = min((slot for slot in free if not self._texts[slot]), default=None)
        if empty is not None:
            return empty
        oldest = min(free, key=self._used.__getitem__, default=None)
        if oldest is not None and self._call - self._used[oldest] > _IDLE_CALLS:
            return oldest
        size = len(self)
        more = min(self._most, max(2 * size, wanted)) - size
        if more > 0:
            self._texts += [()] * more
            self._used += [0] * more
            free.update(range(size, size + more))
            return size
        assert oldest is not None
        return oldest


def _nearest(ordered: list[tuple[Ids, int]], text: Ids) -> tuple[tuple[Ids, int], int]:
    """Of sorted texts, the one with the longest common prefix, and that prefix's length."""
    place = bisect_left(ordered, (text, -1))
    best: tuple[tuple[Ids, int], int] = ((), -1), 0
    for pair in ordered[max(0, place - 1) : place + 1]:
        common = _common(pair[0], text)
        if common > best[1]:
            best = pair, common
    return best


def _common(one: Ids, other: Ids) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
