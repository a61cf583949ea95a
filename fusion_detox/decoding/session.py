"""``CalibratorSession``: a calibrator's distributions after any texts, and its KV cache.

From top to bottom: the session, the distributions that it keeps, the recent divergence between the
two models, and the planner that decides which slot of the KV cache serves which text.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusion_detox.decoding.build_decoder import build_decoder
from fusion_detox.decoding.kv_cache import Row
from fusion_detox.errors import ConfigError
from fusion_detox.files.forks import renew_after_fork
from fusion_detox.vocabulary.map import Distributions

if TYPE_CHECKING:
    from fusion_detox.calibrator.calibrator import Calibrator

Ids = tuple[int, ...]

RECENT = 16
"""Number of positions that the divergence averages; 32, or all, separate toxic text no better."""
# Minimum number of texts whose distributions are kept in memory, and maximum bytes.
_MEMO_ENTRIES, _MEMO_BYTES = 64, 256 * 2**20
_DIVERGENCE_ENTRIES, _DIVERGENCE_PARENTS = 4096, 4
# Rows with more new tokens than this are run apart from rows with few.
_FEW_TOKENS = 8
# Bounds of one forward pass: tokens fed, and bytes of logits returned.
_FORWARD_TOKENS, _FORWARD_BYTES = 8192, 32 * 2**20
# A slot may be taken over if at most this many of its tokens are lost.
_EXPENDABLE = 16
_PARENTS = 4
# Slots that this many calls have not used are reused before the cache grows.
_IDLE_CALLS = 8
# Differences of logits are cut to this size, in nats, so that they stay finite.
_MAX_GAP = 1e4


class Reading(NamedTuple):
    """A session's results for the texts of one step.

    Attributes:
        values: At each prefix, float32 next-token probabilities, ``vocabulary_size`` wide, or the
            last hidden state; the clean model first, then the reference.
        divergence: Mean ``KL(reference ‖ clean)`` of each text for which it was requested, in nats.
    """

    values: Distributions
    divergence: list[float]


class CalibratorSession:
    """Next-token probabilities of a calibrator's models, computed incrementally.

    The result is a pure function of each prefix; the cache only saves time. A prefix that extends,
    shortens or branches off an earlier one costs only its new tokens, and a recently requested one
    costs nothing. All prefixes of a call run in one batch.

    Texts longer than the calibrator's context are cut at the front in strides of half of it, so the
    window of a growing text rarely moves and depends only on the text's length.

    Safe to use from several threads. Copies and pickles carry no cache.

    Args:
        calibrator: Its models are read, never changed. Models on another device, or in half
            precision for a CPU (which computes in float32), are copied.
        device: Where to run.
        reference: Whether to run the reference model too, if there is one.
        max_rows: Maximum number of texts whose keys and values are kept.

    Raises:
        ConfigError: ``max_rows`` is less than 1.
        ModelError: A model cannot run with a cache that can be rolled back.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        *,
        device: torch.device,
        reference: bool = True,
        max_rows: int = 256,
    ) -> None:
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1, but is {max_rows}")
        self._calibrator = calibrator
        # Add the device's index, since tensors report their device with one.
        self._device = torch.empty(0, device=device).device
        self._reference = reference
        self._max_rows = max_rows
        self._lock = threading.Lock()
        with plain_mode(self._device):
            self._decoder = build_decoder(calibrator, self._device, reference=reference)
        self._forget()
        renew_after_fork(self)

    def read(
        self,
        prefixes: Sequence[Ids],
        *,
        divergence_of: Sequence[Ids] = (),
        hidden: bool = False,
    ) -> Reading:
        """Runs the models on whatever part of these texts is new.

        Args:
            prefixes: Calibrator ids without BOS. Equal prefixes, and prefixes of others, cost
                nothing extra.
            divergence_of: Texts whose recent divergence to return; this needs the reference.
            hidden: Return last hidden states (the output layer's inputs) instead.

        Returns:
            See :class:`Reading`; the values are on the session's device.

        Raises:
            ModelError: Hidden states are requested from a model without an output layer.
        """
        with self._lock, plain_mode(self._device):
            texts = [self._window(prefix) for prefix in prefixes]
            unknown = {one: self._window(one) for one in self._recent.unknown(divergence_of)}
            measured = set(unknown.values())
            if hidden:
                nats = self._compute((), self._memo, measured)[1] if measured else {}
                found = self._compute(texts, self._hidden_memo)[0]
            else:
                found, nats = self._compute(texts, self._memo, measured)
            values = {one: nats[window] for one, window in unknown.items()}
            divergence = self._recent.means(divergence_of, values)
            return Reading(self._values([found[text] for text in texts]), divergence)

    def log_probs(self, prefixes: Sequence[Ids]) -> Tensor:
        """``(distributions, prefixes, vocabulary_size)`` log-probs; see :meth:`read`."""
        return self.read(prefixes).values.rows(range(len(prefixes))).log()

    def hidden(self, prefixes: Sequence[Ids]) -> Tensor:
        """``(distributions, prefixes, width)`` last hidden states; see :meth:`read`."""
        return self.read(prefixes, hidden=True).values.rows(range(len(prefixes))).clone()

    def recent_divergence(self, texts: Sequence[Ids]) -> list[float]:
        """The divergence alone; see :meth:`read`."""
        return self.read((), divergence_of=texts).divergence

    def reset(self) -> None:
        """Frees the memory of the cache. Results do not depend on it."""
        with self._lock:
            self._forget()
            self._decoder.resize(0)

    def after_fork(self) -> None:
        """Starts afresh in a forked child, since another thread may have been using the cache."""
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._memo, self._hidden_memo = _Memo(), _Memo()
        self._recent = RecentDivergence(self._calibrator.context_length)
        self._planner = Planner(self._max_rows)
        self._allocated = 0

    def _window(self, prefix: Ids) -> Ids:
        """The part that the calibrator sees: BOS, then the prefix from a multiple of the stride."""
        length = self._calibrator.context_length
        stride = length // 2
        excess = max(0, len(prefix) + 1 - length)
        start = -(-excess // stride) * stride
        return (self._calibrator.bos_id, *prefix[start:])

    def _compute(
        self, texts: Collection[Ids], memo: _Memo, measured: Collection[Ids] = ()
    ) -> tuple[dict[Ids, _Entry], dict[Ids, float]]:
        """Entries of ``texts``, and ``KL(reference ‖ clean)`` after each of ``measured``."""
        found: dict[Ids, _Entry] = {}
        nats: dict[Ids, float] = {}
        missing = set()
        for text in {*texts, *measured}:
            entry = memo.get(text)
            if entry is None:
                missing.add(text)
            else:
                found[text] = entry
        paths = split_into_paths(missing)
        kept = set(texts)
        for start in range(0, len(paths), self._max_rows):
            run = self._run(paths[start : start + self._max_rows], memo is self._hidden_memo)
            for asked, values, divergence in run:
                # What is needed only for the divergence is not worth keeping in memory.
                columns = [column for column, text in enumerate(asked) if text in kept]
                if len(columns) < len(asked):
                    block = _Block(values[:, columns], divergence)
                else:
                    block = _Block(values, divergence)
                for number, column in enumerate(columns):
                    entry = _Entry(block, number, column)
                    memo.put(asked[column], entry)
                    found[asked[column]] = entry
                if divergence is not None and measured:
                    nats.update(zip(asked, divergence.tolist(), strict=True))
        for text in measured:
            if text not in nats:
                nats[text] = found[text].nats()
        memo.trim(max(_MEMO_ENTRIES, 2 * len(found)), _MEMO_BYTES)
        return found, nats

    def _run(
        self, wanted: list[Path], hidden: bool
    ) -> Iterator[tuple[list[Ids], Tensor, Tensor | None]]:
        """Yields the requested texts of each forward pass, their values and their divergence."""
        planner = self._planner
        plan = planner.plan(wanted)
        if self._allocated != len(planner):
            self._decoder.resize(len(planner))
            self._allocated = len(planner)
        for copied in plan.copies:
            self._decoder.copy(*copied)
        texts = {row.slot: path.text for row, path in zip(plan.rows, wanted, strict=True)}
        size = self._decoder.distributions * self._calibrator.vocabulary_size * 4
        for rows in _batches(plan.rows, max(1, _FORWARD_BYTES // size)):
            divergence = None
            if hidden:
                values = self._decoder.hidden(rows).float()
            else:
                logits = self._decoder.logits(rows)[..., : self._calibrator.vocabulary_size]
                values = torch.softmax(logits, -1, dtype=torch.float32)
                if self._decoder.distributions == 2:
                    divergence = _divergence(logits, values)
            for row in rows:
                planner.hold(row.slot, plan.texts[row.slot])
            asked = [texts[row.slot][: row.start + at + 1] for row in rows for at in row.asked]
            yield asked, values, divergence

    def _values(self, entries: list[_Entry]) -> Distributions:
        """The values of some entries, where they are."""
        if not entries:
            size = (self._decoder.distributions, 0, self._calibrator.vocabulary_size)
            return Distributions.of(torch.empty(size, device=self._device))
        blocks = {id(entry.block): entry.block.values for entry in entries}
        number = {key: index for index, key in enumerate(blocks)}
        return Distributions(
            list(blocks.values()),
            [number[id(entry.block)] for entry in entries],
            [entry.column for entry in entries],
        )

    def __reduce__(self) -> tuple[Callable[..., CalibratorSession], tuple[Any, ...]]:
        """Rebuild without the cache, for ``copy``, ``deepcopy`` and ``pickle``."""
        make = functools.partial(
            CalibratorSession,
            device=self._device,
            reference=self._reference,
            max_rows=self._max_rows,
        )
        return make, (self._calibrator,)


@contextlib.contextmanager
def plain_mode(device: torch.device) -> Iterator[None]:
    """Disables gradients, and the caller's inference mode and autocast."""
    with torch.inference_mode(False), torch.no_grad():
        if not torch.is_autocast_enabled(device.type):
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield


def _batches(rows: list[Row], positions: int) -> Iterator[list[Row]]:
    """Yields the rows of each forward pass: of similar lengths, in the order of their slots.

    Args:
        rows: What to run.
        positions: Maximum positions per forward pass, unless a single row asks for more.
    """
    few = [row for row in rows if len(row.tokens) <= _FEW_TOKENS]
    many = sorted((row for row in rows if len(row.tokens) > _FEW_TOKENS), key=_count)
    for part in (few, many):
        batch: list[Row] = []
        asked = 0
        for row in part:
            asked += len(row.asked)
            tokens = (len(batch) + 1) * len(row.tokens)
            if batch and (tokens > _FORWARD_TOKENS or asked > positions):
                yield sorted(batch)
                batch, asked = [], len(row.asked)
            batch.append(row)
        if batch:
            yield sorted(batch)


def _count(row: Row) -> int:
    return len(row.tokens)


def _divergence(logits: Tensor, probs: Tensor) -> Tensor:
    """``(texts,)`` nats, ``KL(reference ‖ clean)``.

    Args:
        logits: ``(2, texts, vocab)``, clean before reference.
        probs: Their softmax.
    """
    difference = (logits[1].float() - logits[0].float()).nan_to_num_(0.0, _MAX_GAP, -_MAX_GAP)
    mean = torch.bmm(probs[1, :, None], difference[:, :, None]).view(-1)
    # The normalisers' difference, from the token where the reference is most precise.
    top = probs[1].argmax(-1, keepdim=True)
    clean, reference = (own.gather(-1, top).clamp_min(1e-38).log() for own in probs)
    normalisers: Tensor = difference.gather(-1, top) + clean - reference
    return (mean - normalisers.view(-1)).clamp_min(0.0)


class _Block:
    """The values of one forward pass, ``(distributions, kept, vocab or width)``.

    Attributes:
        values: The values.
        divergence: ``(asked,)`` nats, of all texts of that pass; ``None`` without a reference.
        users: Number of entries that use it.
    """

    def __init__(self, values: Tensor, divergence: Tensor | None) -> None:
        self.values = values
        self.divergence = divergence
        self.users = 0

    @property
    def width(self) -> int:
        """Number of columns, used or not."""
        return self.values.shape[1]


class _Entry(NamedTuple):
    block: _Block
    column: int  # of the values
    asked: int  # index of its divergence

    def nats(self) -> float:
        assert self.block.divergence is not None
        return float(self.block.divergence[self.asked])


class _Memo:
    """The most recently used values, by text.

    A block's memory is freed once none of its columns is kept; until then all of it counts. If few
    are kept, they are copied to a smaller block.
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
        thinned: dict[int, _Block] = {}
        while self._entries and (len(self._entries) > entries or self.bytes > size):
            block = self._entries.popitem(last=False)[1].block
            block.users -= 1
            thinned[id(block)] = block
            if block.users == 0:
                self.bytes -= block.values.nbytes
        sparse = {key for key, block in thinned.items() if 0 < 4 * block.users <= block.width}
        if not sparse:
            return
        kept: dict[int, list[tuple[Ids, _Entry]]] = {key: [] for key in sparse}
        for text, entry in self._entries.items():
            if id(entry.block) in sparse:
                kept[id(entry.block)].append((text, entry))
        for pairs in kept.values():
            old = pairs[0][1].block
            columns = torch.tensor([entry.column for _, entry in pairs], device=old.values.device)
            block = _Block(old.values.index_select(1, columns), old.divergence)
            block.users = len(pairs)
            self.bytes += block.values.nbytes - old.values.nbytes
            for column, (text, entry) in enumerate(pairs):
                self._entries[text] = entry._replace(block=block, column=column)


class RecentDivergence:
    """``KL(reference ‖ clean)`` of the next token, averaged over a text's last positions.

    It measures how much of the reference's text the clean model holds back. It is large if a text
    is toxic or about to be, and small in harmless text. The values of earlier prefixes are kept, so
    one more token costs only its own log-probs.

    Args:
        context_length: The calibrator's.
    """

    def __init__(self, context_length: int) -> None:
        self._reach = context_length + RECENT
        self._memo: OrderedDict[tuple[int, Ids], tuple[float, ...]] = OrderedDict()

    def unknown(self, texts: Iterable[Ids]) -> list[Ids]:
        """The prefixes whose divergence must be computed before :meth:`means` can answer."""
        found: dict[Ids, None] = {}
        for text in texts:
            first = self._nearest(text)[1]
            found.update(dict.fromkeys(text[:end] for end in range(first, len(text) + 1)))
        return list(found)

    def means(self, texts: Sequence[Ids], values: Mapping[Ids, float]) -> list[float]:
        """The mean in nats over at most the last ``RECENT`` positions of each text.

        Args:
            texts: Calibrator ids without BOS; the position before their first token counts too.
            values: The divergence, in nats, after each of the ``unknown`` prefixes.
        """
        # Look up all values before storing any, since storing may drop older ones.
        known = [self._nearest(text) for text in texts]
        means = []
        for text, (recent, first) in zip(texts, known, strict=True):
            new = [values[text[:end]] for end in range(first, len(text) + 1)]
            recent = (*recent, *new)[-RECENT:]
            key = self._key(text, len(text))
            self._memo[key] = recent
            self._memo.move_to_end(key)
            means.append(sum(recent) / len(recent))
        while len(self._memo) > max(_DIVERGENCE_ENTRIES, len(texts)):
            self._memo.popitem(last=False)
        return means

    def _key(self, text: Ids, length: int) -> tuple[int, Ids]:
        """What determines a prefix's values: its end, and its length, which sets the window."""
        return length, text[max(0, length - self._reach) : length]

    def _nearest(self, text: Ids) -> tuple[tuple[float, ...], int]:
        """The known values of a slightly shorter prefix, and the first length without a value."""
        for missing in range(min(_DIVERGENCE_PARENTS, len(text)) + 1):
            recent = self._memo.get(self._key(text, len(text) - missing))
            if recent is not None:
                return recent, len(text) - missing + 1
        return (), max(0, len(text) + 1 - RECENT)


class Path(NamedTuple):
    """A text to run, and the lengths of its prefixes whose next token is asked for."""

    text: Ids
    lengths: tuple[int, ...]


def split_into_paths(texts: Iterable[Ids]) -> list[Path]:
    """Merges texts that are prefixes of others into those, as further lengths to ask for."""
    paths: list[Path] = []
    # In this order, a text directly follows those that it is a prefix of.
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
        copies: Source slot, target slot, first and last column; to be copied first, in this order.
        texts: What each slot of ``rows`` holds once its work is done.
    """

    rows: list[Row]
    copies: list[tuple[int, int, int, int]]
    texts: dict[int, Ids]


class Planner:
    """Tracks which slot holds which text, and chooses the best slot for a new text."""

    def __init__(self, max_slots: int) -> None:
        self._max_slots = max_slots
        self._texts: list[Ids] = []  # () for an empty slot
        self._used: list[int] = []  # number of the last call that used the slot
        self._slot: dict[Ids, int] = {}
        self._call = 0

    def __len__(self) -> int:
        return len(self._texts)

    def hold(self, slot: int, text: Ids) -> None:
        """Records what a slot's columns hold."""
        old = self._texts[slot]
        if self._slot.get(old) == slot:
            del self._slot[old]
        self._texts[slot] = text
        if text:
            self._slot[text] = slot

    def plan(self, paths: Sequence[Path]) -> Plan:
        """Chooses a slot for each text (at most ``max_slots`` of them) and what to copy first.

        A text that extends another takes over its slot. Other texts take over the slot with the
        longest common prefix if little else is lost, or get a copy of that prefix. The work may
        fail, so until it is done, slots are recorded as holding only the columns that stay valid.
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
        """Assigns slots to paths whose parent is not cached or already taken."""
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
                if old:  # overwritten, so it can no longer be copied
                    sources.remove((old, slot))
            found[index] = slot, max(common, kept)

    def _vacate(self, free: set[int], wanted: int) -> int:
        """An empty slot, or the least recently used one."""
        empty = min((slot for slot in free if not self._texts[slot]), default=None)
        if empty is not None:
            return empty
        oldest = min(free, key=self._used.__getitem__, default=None)
        if oldest is not None and self._call - self._used[oldest] > _IDLE_CALLS:
            return oldest
        size = len(self)
        more = min(self._max_slots, max(2 * size, wanted)) - size
        if more > 0:
            self._texts += [()] * more
            self._used += [0] * more
            free.update(range(size, size + more))
            return size
        assert oldest is not None
        return oldest


def _nearest(ordered: list[tuple[Ids, int]], text: Ids) -> tuple[tuple[Ids, int], int]:
    """Of sorted texts, the one with the longest common prefix, and the length of that prefix."""
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
