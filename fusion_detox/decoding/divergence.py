"""How far a calibrator's two models have lately differed on a text: whether it is suspect."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

from fusion_detox.decoding.slot_plan import Ids

Key = tuple[int, Ids]
RECENT = 16
"""Tokens looked back on; 32 or all tell toxic from harmless beginnings no better."""
_NEAR, _ENTRIES = 4, 4096
_BYTES, _MOST_CALLS = 64 * 2**20, 4


class RecentDivergence:
    """``KL(reference ‖ clean)`` of the next token, averaged over a text's last positions.

    It is what the clean model holds back of what the reference would write: large where a text is
    toxic or about to be, small in harmless text. A pure function of each text; the values of
    prefixes are only a memo, so that one more token costs no more than its own log-probs.

    Args:
        context_length: The calibrator's.
        vocabulary_size: The calibrator's.
    """

    def __init__(self, context_length: int, vocabulary_size: int) -> None:
        self._reach = context_length + RECENT
        self._row_bytes = 8 * vocabulary_size
        self._memo: OrderedDict[Key, tuple[float, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self, texts: Sequence[Ids], log_probs: Callable[[Sequence[Ids]], Tensor]
    ) -> list[float]:
        """The mean in nats over the last ``RECENT`` positions of each text, or all of fewer.

        Args:
            texts: Calibrator ids without BOS; the position before their first token counts too.
            log_probs: Of prefixes, ``(2, prefixes, vocab)``: clean and reference.
        """
        with self._lock:
            known = {text: self._nearest(text) for text in texts}
        new = dict.fromkeys(
            text[:end] for text, (_, first) in known.items() for end in range(first, len(text) + 1)
        )
        values = self._values(list(new), log_probs)
        found = {
            text: (*recent, *(values[text[:end]] for end in range(first, len(text) + 1)))[-RECENT:]
            for text, (recent, first) in known.items()
        }
        with self._lock:
            for text, recent in found.items():
                key = self._key(text, len(text))
                self._memo[key] = recent
                self._memo.move_to_end(key)
            while len(self._memo) > max(_ENTRIES, len(found)):
                self._memo.popitem(last=False)
        return [sum(found[text]) / len(found[text]) for text in texts]

    def _key(self, text: Ids, length: int) -> Key:
        """What decides the value of so much of a text: windows depend on its length alone."""
        return length, text[max(0, length - self._reach) : length]

    def _nearest(self, text: Ids) -> tuple[tuple[float, ...], int]:
        """What is known of a prefix a few tokens shorter, and the first length not yet known."""
        for missing in range(min(_NEAR, len(text)) + 1):
            recent = self._memo.get(self._key(text, len(text) - missing))
            if recent is not None:
                return recent, len(text) - missing + 1
        return (), max(0, len(text) + 1 - RECENT)

    def _values(
        self, prefixes: list[Ids], log_probs: Callable[[Sequence[Ids]], Tensor]
    ) -> dict[Ids, float]:
        """In parts, for the memory's sake, but few: to a session each is a step."""
        values: dict[Ids, float] = {}
        if not prefixes:
            return values
        parts = min(_MOST_CALLS, -(-len(prefixes) * self._row_bytes // _BYTES))
        size = -(-len(prefixes) // max(1, parts))
        for start in range(0, len(prefixes), size):
            part = prefixes[start : start + size]
            clean, reference = log_probs(part)
            divergence = (reference.exp() * (reference - clean)).sum(-1).clamp_min(0.0)
            values.update(zip(part, divergence.tolist(), strict=True))
        return values
