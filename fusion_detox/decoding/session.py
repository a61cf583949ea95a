"""A calibrator's log-probs or hidden states after any texts, with a KV cache as a mere memo."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusion_detox.decoding.decoder import Row, build_decoder
from fusion_detox.decoding.divergence import RecentDivergence
from fusion_detox.decoding.heap import Heap
from fusion_detox.decoding.slot_plan import Ids, Path, Planner, split_into_paths
from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    from fusion_detox.calibrator.calibrator import Calibrator

_MEMO_ENTRIES, _MEMO_BYTES = 64, 256 * 2**20
_FEW_TOKENS = 8
_FORWARD_TOKENS = 8192


class CalibratorSession:
    """Next-token log-probs of a calibrator's distributions.

    A pure function of each prefix: what was computed before only saves time. A prefix that
    extends, shortens or branches off an earlier one costs its new tokens; one that was asked for
    lately costs nothing. All prefixes of a call are run in one batch.

    Longer texts than the calibrator's context are cut at the front in strides of half of it, so
    that the window of a growing text moves seldom and depends on nothing but its length.

    Safe to use from several threads. Copies and pickles carry no cache.

    Args:
        calibrator: Its models are read, never changed; where they are on another device, or in half
            precision and the device is the CPU (which then computes in float32), they are copied.
        device: Where to run.
        max_rows: Most texts whose keys and values are kept.

    Raises:
        ConfigError: ``max_rows`` is less than 1.
        ModelError: A model cannot be run with a cache that can be taken back.
    """

    def __init__(
        self, calibrator: Calibrator, *, device: torch.device, max_rows: int = 256
    ) -> None:
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1, but is {max_rows}")
        self._calibrator = calibrator
        # With its index, so that it compares equal to that of a tensor there.
        self._device = torch.empty(0, device=device).device
        self._max_rows = max_rows
        self._lock = threading.Lock()
        with plain_mode(self._device):
            self._decoder = build_decoder(calibrator, self._device)
        self._heap = Heap()
        self._forget()

    def log_probs(self, prefixes: Sequence[Ids]) -> Tensor:
        """Log-probs of the token after each prefix.

        Args:
            prefixes: Calibrator ids without BOS; equal ones, and prefixes of others, cost nothing
                extra.

        Returns:
            ``(distributions, len(prefixes), vocabulary_size)`` in float32 on the session's device:
            the clean distribution, then the reference's if there is one.
        """
        return self._ask(prefixes, hidden=False)

    def hidden(self, prefixes: Sequence[Ids]) -> Tensor:
        """Last hidden states after each prefix: what the output layer makes its logits of.

        Args:
            prefixes: As in ``log_probs``.

        Returns:
            ``(distributions, len(prefixes), width)`` in float32, otherwise as ``log_probs``.

        Raises:
            ModelError: A model names no output layer.
        """
        return self._ask(prefixes, hidden=True)

    def recent_divergence(self, prefixes: Sequence[Ids]) -> list[float]:
        """By how much the two models have lately differed on each prefix.

        Args:
            prefixes: As in ``log_probs``; there must be a reference.

        Returns:
            ``KL(reference ‖ clean)`` of the next token in nats, averaged over the last 16 positions
            of each prefix.
        """
        return self._recent(prefixes, self.log_probs)

    def _ask(self, prefixes: Sequence[Ids], *, hidden: bool) -> Tensor:
        texts = [self._window(prefix) for prefix in prefixes]
        with self._lock, plain_mode(self._device):
            memo = self._hidden_memo if hidden else self._memo
            found: dict[Ids, _Entry] = {}
            missing = set()
            for text in texts:
                entry = memo.get(text)
                if entry is None:
                    missing.add(text)
                else:
                    found[text] = entry
            paths = split_into_paths(missing)
            for start in range(0, len(paths), self._max_rows):
                found.update(self._run(paths[start : start + self._max_rows], memo))
            memo.trim(max(_MEMO_ENTRIES, 8 * len(found)), _MEMO_BYTES)
            self._heap.watch()
            return self._gather([found[text] for text in texts])

    def reset(self) -> None:
        """Free the memory of the cache. Results do not depend on it."""
        with self._lock:
            self._forget()
            self._decoder.resize(0)

    def _forget(self) -> None:
        self._memo, self._hidden_memo = _Memo(), _Memo()
        calibrator = self._calibrator
        self._recent = RecentDivergence(calibrator.context_length, calibrator.vocabulary_size)
        self._planner = Planner(self._max_rows)
        self._allocated = 0

    def _window(self, prefix: Ids) -> Ids:
        """What the calibrator sees of a prefix: BOS and the end, from a multiple of the stride."""
        length = self._calibrator.context_length
        stride = length // 2
        excess = max(0, len(prefix) + 1 - length)
        start = -(-excess // stride) * stride
        return (self._calibrator.bos_id, *prefix[start:])

    def _run(self, wanted: list[Path], memo: _Memo) -> Iterator[tuple[Ids, _Entry]]:
        planner = self._planner
        plan = planner.plan(wanted)
        if self._allocated != len(planner):
            self._decoder.resize(len(planner))
            self._allocated = len(planner)
        for copied in plan.copies:
            self._decoder.copy(*copied)
        texts = {row.slot: path.text for row, path in zip(plan.rows, wanted, strict=True)}
        for rows in _batches(plan.rows):
            block = _Block(self._values(rows, memo is self._hidden_memo))
            for row in rows:
                planner.hold(row.slot, plan.texts[row.slot])
            asked = [texts[row.slot][: row.start + at + 1] for row in rows for at in row.asked]
            for column, text in enumerate(asked):
                entry = _Entry(block, column)
                memo.put(text, entry)
                yield text, entry

    def _values(self, rows: list[Row], hidden: bool) -> Tensor:
        if hidden:
            return self._decoder.hidden(rows).float()
        logits = self._decoder.logits(rows)[..., : self._calibrator.vocabulary_size]
        return torch.log_softmax(logits, -1, dtype=torch.float32)

    def _gather(self, entries: list[_Entry]) -> Tensor:
        """A tensor of the caller's own."""
        if not entries:
            size = (self._decoder.distributions, 0, self._calibrator.vocabulary_size)
            return torch.empty(size, device=self._device)
        block = entries[0].block
        if all(entry.block is block for entry in entries):
            columns = torch.tensor([entry.column for entry in entries], device=self._device)
            return block.values.index_select(1, columns)
        return torch.stack([entry.block.values[:, entry.column] for entry in entries], 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from what it was made of, for ``copy``, ``deepcopy`` and ``pickle``."""
        make = functools.partial(CalibratorSession, device=self._device, max_rows=self._max_rows)
        return make, (self._calibrator,)


@contextlib.contextmanager
def plain_mode(device: torch.device) -> Iterator[None]:
    """No gradients, and no trace of the caller's inference mode or autocast."""
    off = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), off:
        yield


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows for one forward pass each, of similar lengths, in the order of their slots."""
    few = [row for row in rows if len(row.tokens) <= _FEW_TOKENS]
    many = sorted((row for row in rows if len(row.tokens) > _FEW_TOKENS), key=_count)
    for part in (few, many):
        batch: list[Row] = []
        for row in part:
            if batch and (len(batch) + 1) * len(row.tokens) > _FORWARD_TOKENS:
                yield sorted(batch)
                batch = []
            batch.append(row)
        if batch:
            yield sorted(batch)


def _count(row: Row) -> int:
    return len(row.tokens)


class _Block:
    """What one forward pass gave, ``(distributions, asked, vocab)`` or ``width``."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.users = 0


class _Entry(NamedTuple):
    block: _Block
    column: int


class _Memo:
    """What was asked for last, by text.

    A block's memory is free once none of its columns is kept, and counts as long.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[Ids, _Entry] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, text: Ids) -> _Entry | None:
        entry = self._entries.get(text)
        if entry is not None:
            self._entries.move_to_end(text)
        return entry

    def put(self, text: Ids, entry: _Entry) -> None:
        self._entries[text] = entry
        if entry.block.users == 0:
            self.bytes += entry.block.values.nbytes
        entry.block.users += 1

    def trim(self, entries: int, size: int) -> None:
        while self._entries and (len(self._entries) > entries or self.bytes > size):
            _, (block, _) = self._entries.popitem(last=False)
            block.users -= 1
            if block.users == 0:
                self.bytes -= block.values.nbytes
