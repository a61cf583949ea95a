"""Where each row's text ends, in the calibrator's tokens; only the end is tokenised again.

``TextContext`` reads rows of target ids as text; ``Covers`` lists the ways in which a calibrator
token can continue the last, perhaps unfinished, word.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusion_detox.files.forks import renew_after_fork
from fusion_detox.vocabulary.map import Cover, Distributions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.vocabulary.token_table import TokenTable

Ids = tuple[int, ...]
RowIds = Ids | bytes
"""A row's ids: a tuple, or int64 in native order, which is faster to look up if it is long."""

_ID_BYTES = 8
_LONGEST_WORD = 4  # tokens
# Pre-tokens at the end that more text can change: two with the patterns below, one to spare.
_UNSETTLED = 3
_ENTRIES, _ENTRY_IDS = 4096, 2**21
# Tokens before the calibrator's context that shorter prefixes may see, with some to spare.
_MARGIN = 64
_PARENTS = 4
_SMALLEST = torch.finfo(torch.float32).tiny

# Patterns under which more text changes at most the last two pre-tokens. The first is GPT-2's, the
# next that of Llama 3, Qwen 2 and cl100k, the last that of o200k and Tekken. Any other pattern
# might look arbitrarily far ahead. All but the first are compared without their contractions.
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START, _UPPER, _LOWER = (
    r"[^\r\n\p{L}\p{N}]?",
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
)
_LOCAL_PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        _START + r"\p{L}+|\p{N}" + _REST,
        f"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _REST,
    }
)
# What a chat template writes as the name of a message's author, on a line of its own.
_USER = b"user"
_ROLES = (_USER, b"assistant", b"model", b"system", b"developer", b"tool", b"ipython")
_CONTRACTIONS = re.compile(r"'?\((?:\?i:)?'?[A-Za-z\[\]]+(?:(?:\|'?|')[A-Za-z\[\]]+)*\|?\)[?|]?")


class Position(NamedTuple):
    """Where a text ends, in the calibrator's tokens.

    Attributes:
        path: Calibrator ids of the visible text, without BOS: the canonical tokenisation of its
            complete characters. Of a long text, only the end that the calibrator can see.
        word: The bytes of each of the last tokens of ``path``, from the start of the last pre-token
            on; at most four tokens, and none if the vocabularies are the same.
        pending: Bytes of an unfinished UTF-8 character at the end, at most three.
    """

    path: Ids
    word: tuple[bytes, ...]
    pending: bytes


class Covers(NamedTuple):
    """All ways to read the ends of some texts, and the prefixes whose next token they need.

    The next calibrator token may start at the end of a text, or at an earlier token boundary of its
    last word and extend beyond the end (Vieira et al. 2024; Hayase et al. 2025).

    Attributes:
        prefixes: Calibrator ids, each once.
        covers: For each text, one cover per boundary, the earliest first.
        steps: For each cover, the prefixes (by index) and tokens that lead from the start of the
            word to its boundary.
    """

    prefixes: list[Ids]
    covers: list[Cover]
    steps: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, positions: Sequence[Position]) -> Covers:
        """The covers of each text end."""
        index: dict[Ids, int] = {}
        covers: list[Cover] = []
        steps: list[list[tuple[int, int]]] = []
        for row, position in enumerate(positions):
            depth = len(position.word)
            taken: list[tuple[int, int]] = []
            for back in range(depth, -1, -1):
                cut = len(position.path) - back
                prefix = index.setdefault(position.path[:cut], len(index))
                remainder = b"".join(position.word[depth - back :]) + position.pending
                covers.append(Cover(row, prefix, remainder))
                steps.append(list(taken))
                if back:
                    taken.append((prefix, position.path[cut]))
        return cls(list(index), covers, steps)

    def weights(self, probs: Distributions) -> Tensor:
        """The weight of each cover: the probability of the tokens that lead to its boundary.

        Args:
            probs: Of the next token after each prefix.

        Returns:
            ``(distributions, covers)``; only the proportions within a row matter.
        """
        led = [step for steps in self.steps for step in steps]
        count = len(probs.blocks[0])
        if not led:
            return probs.blocks[0].new_ones(count, len(self.covers))
        prefix, token = np.array(led).T
        # Nothing is known of a probability of 0 but that it is below the smallest number.
        steps = probs.at(prefix, token).clamp_min(_SMALLEST).log()
        owner = np.repeat(np.arange(len(self.steps)), [len(own) for own in self.steps])
        row_of = torch.tensor([cover.row for cover in self.covers], device=probs.device)
        owners = torch.from_numpy(owner).to(probs.device)
        weights = steps.new_zeros(count, len(self.covers)).index_add_(1, owners, steps)
        # Divide by the row's largest weight, so that not all of them underflow.
        row_of = row_of.expand_as(weights)
        largest = weights.new_full((count, self.covers[-1].row + 1), -torch.inf)
        largest.scatter_reduce_(1, row_of, weights, "amax")
        return (weights - largest.gather(1, row_of)).exp_()


class _State(NamedTuple):
    """The state of a row's text so far, sufficient to continue it."""

    position: Position
    settled: int  # leading tokens of the path that no further text can change
    tail: str  # the text after those
    padded: bool  # only padding so far
    begun: bool  # a text has begun
    markup: Ids | None = None  # after a token of the chat template: what may be a role's name
    named: bool = False  # that name has been read


_START_OF_TEXT = _State(Position((), (), b""), 0, "", padded=False, begun=False)
_START_OF_ROW = _START_OF_TEXT._replace(padded=True)


class TextContext:
    """Reads rows of target ids as text for the calibrator.

    A pure function of each row. The states of earlier prefixes are only a memo, so one more token
    costs only the tokenisation of the last few words. Bytes are joined and never decoded token by
    token, so a character that is split over tokens comes out whole; invalid UTF-8 becomes U+FFFD.

    Leading padding is skipped. A token that begins or ends a text starts a new one. Other special
    tokens count as a line break, and so do ids without a meaning (in a padded head, or below 0).

    Of a chat, the calibrator reads the last request and the answer, with a line break between
    them: each message of the user starts a new text, and the markup of the chat template (its
    tokens, the names of roles and the line breaks after them) is skipped.

    Args:
        calibrator: Provides the tokenizer and its token table.
        target_tokens: The bytes of the target's tokens.
        identity: Whether both vocabularies are the same, id for id; then ids are passed on as
            they are.
        pad_id: The target's padding token.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        target_tokens: TokenTable,
        identity: bool,
        pad_id: int | None,
    ) -> None:
        self._token_bytes = target_tokens.token_bytes
        self._turns = target_tokens.turn_ids
        self._special = target_tokens.special_ids | self._turns
        self._reset = target_tokens.reset_ids - self._turns
        self._dummy_prefix = target_tokens.dummy_prefix
        self._identity = identity
        self._pad_id = pad_id
        # Longer paths lose whole strides at the front, which moves no window of the calibrator.
        self._stride = calibrator.context_length // 2
        self._longest_path = calibrator.context_length + _MARGIN
        self._line_break: int | None = None
        if identity:
            if b"\n" in self._token_bytes:
                self._line_break = self._token_bytes.index(b"\n")
        else:
            self._calibrator_token_bytes = calibrator.tokens.token_bytes
            self._byte_level = calibrator.tokens.kind == "byte-level"
            self._tokenizer, self._incremental = _plain(calibrator.tokenizer.backend_tokenizer)
        self._forget()

    def read(self, ids: RowIds) -> Position:
        """Where the text of a row ends.

        Args:
            ids: The row's target ids, including padding and special tokens.
        """
        with self._lock:
            state = self._memo.get(ids)
            if state is None:
                state = self._shortened(self._advance(*self._nearest(ids)))
                self._remember(ids, state)
            else:
                self._memo.move_to_end(ids)
            return state.position

    def read_uncached(self, ids: Ids) -> Position:
        """The whole path, without the memo, tokenising the whole text; slow, for checks."""
        return self._advance(_START_OF_ROW, ids, settle=False).position

    def reset(self) -> None:
        """Frees the memory of the memo. Results do not depend on it."""
        with self._lock:
            self._memo.clear()
            self._size = 0

    def _nearest(self, ids: RowIds) -> tuple[_State, Ids]:
        """The state of a slightly shorter prefix, and the ids that follow it."""
        size = _ID_BYTES if isinstance(ids, bytes) else 1
        for missing in range(1, min(_PARENTS, len(ids) // size) + 1):
            state = self._memo.get(ids[: -missing * size])
            if state is not None:
                return state, _listed(ids[-missing * size :])
        return _START_OF_ROW, _listed(ids)

    def _shortened(self, state: _State) -> _State:
        """Drops strides at the front of a long path, up to its last settled token."""
        path = state.position.path
        settled = len(path) if self._identity else state.settled
        surplus = min(settled, len(path) - self._longest_path)
        drop = max(0, surplus // self._stride * self._stride)
        if not drop:
            return state
        position = state.position._replace(path=path[drop:])
        return state._replace(position=position, settled=max(0, state.settled - drop))

    def _advance(self, state: _State, ids: Ids, settle: bool = True) -> _State:
        if state.padded:
            start = next((i for i, id in enumerate(ids) if id != self._pad_id), len(ids))
            if start == len(ids):
                return state
            state, ids = _START_OF_TEXT, ids[start:]
        for back, id in enumerate(reversed(ids)):
            if id in self._reset:
                state, ids = _START_OF_TEXT, ids[len(ids) - back :]
                break
        if state.markup is not None or not self._turns.isdisjoint(ids):
            state, ids = self._without_markup(state, ids)
        if self._identity:
            return self._advance_ids(state, ids)
        return self._advance_text(state, ids, settle and self._incremental)

    def _without_markup(self, state: _State, ids: Ids) -> tuple[_State, Ids]:
        """Skips the markup of the chat template except for one line break after a message."""
        held, named = state.markup, state.named
        kept: list[int] = []
        for id in ids:
            turn = id in self._turns
            if held is None:
                kept.append(id)
                held, named = () if turn else None, False
                continue
            text = b"".join(map(self._spelled, held if turn else (*held, id)))
            name, ends = text.strip(), turn or b"\n" in text.lstrip()
            role = ends and not named and name in _ROLES
            if role and name == _USER:
                state, kept = _START_OF_TEXT, []
            if role or not name:
                held, named = (), role or (named and not turn)
            elif not (ends or named) and any(one.startswith(name) for one in _ROLES):
                held = (*held, id)
            else:
                kept += [*held, id]
                held, named = () if turn else None, False
        return state._replace(markup=held, named=named), tuple(kept)

    def _spelled(self, id: int) -> bytes:
        return b"\n" if self._is_boundary(id) else self._token_bytes[id] or b""

    def _advance_ids(self, state: _State, ids: Ids) -> _State:
        path = list(state.position.path)
        for id in ids:
            if not self._is_boundary(id):
                path.append(id)
            elif path and self._line_break is not None:
                path.append(self._line_break)
        return state._replace(position=Position(tuple(path), (), b""))

    def _advance_text(self, state: _State, ids: Ids, settle: bool) -> _State:
        begun = state.begun
        data = bytearray(state.position.pending)
        for id in ids:
            if self._is_boundary(id):
                piece = b"\n" if begun else b""
            else:
                piece = self._token_bytes[id] or b""
                if not begun and self._dummy_prefix:
                    piece = piece.removeprefix(b" ")
                begun = True
            data += piece
        added, used = codecs.utf_8_decode(data, "replace", False)
        pending = bytes(data[used:])
        if pending[:1] == b"\xed" and pending[1:] >= b"\xa0":
            # The codec waits for the other half of a surrogate pair, which UTF-8 does not have.
            added, pending = added + "\ufffd" * len(pending), b""
        if not added:
            position = state.position._replace(pending=pending)
            return state._replace(position=position, begun=begun)
        tail = state.tail + added
        encoding = self._tokenizer.encode(tail, add_special_tokens=False)
        tokens, words = encoding.ids, [word or 0 for word in encoding.word_ids]
        path = state.position.path[: state.settled] + tuple(tokens)
        position = Position(path, self._word(tokens, words), pending)
        settled = state.settled
        if settle and words and words[-1] >= _UNSETTLED:
            cut = bisect_left(words, words[-1] + 1 - _UNSETTLED)
            settled += cut
            tail = tail[encoding.offsets[cut][0] :]
        return state._replace(
            position=position, settled=settled, tail=tail, padded=False, begun=begun
        )

    def _word(self, tokens: list[int], words: list[int]) -> tuple[bytes, ...]:
        found: list[bytes] = []
        for token, word in zip(reversed(tokens), reversed(words), strict=True):
            piece = self._calibrator_token_bytes[token]
            if word != words[-1] or piece is None or len(found) == _LONGEST_WORD:
                break
            found.append(piece)
            # Other kinds of tokenizer may have no pre-tokens, or one for the whole text.
            if not self._byte_level and piece[:1].isspace():
                break
        return tuple(reversed(found))

    def _is_boundary(self, id: int) -> bool:
        # Some models mark the positions of images with ids below 0.
        known = 0 <= id < len(self._token_bytes) and id not in self._special
        return not known or self._token_bytes[id] is None

    def _remember(self, ids: RowIds, state: _State) -> None:
        self._memo[ids] = state
        self._size += _size(ids) + len(state.tail)
        while len(self._memo) > 1 and (len(self._memo) > _ENTRIES or self._size > _ENTRY_IDS):
            oldest, dropped = self._memo.popitem(last=False)
            self._size -= _size(oldest) + len(dropped.tail)

    def after_fork(self) -> None:
        """Starts afresh in a forked child, since another thread may have been using the memo."""
        self._forget()

    def _forget(self) -> None:
        self._memo: OrderedDict[RowIds, _State] = OrderedDict()
        self._size = 0
        self._lock: threading.Lock = threading.Lock()
        renew_after_fork(self)

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle, without the memo, which is useless elsewhere."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_memo", "_size", "_lock")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _listed(ids: RowIds) -> Ids:
    return tuple(memoryview(ids).cast("q")) if isinstance(ids, bytes) else ids


def _size(ids: RowIds) -> int:
    return len(ids) // _ID_BYTES if isinstance(ids, bytes) else len(ids)


def _plain(backend: Tokenizer) -> tuple[Tokenizer, bool]:
    """A copy that treats special tokens as plain text, and whether it splits text locally."""
    from tokenizers import Tokenizer

    definition = json.loads(backend.to_str())
    # Post-processors add special tokens or trim offsets.
    for name in ("post_processor", "truncation", "padding"):
        definition[name] = None
    plain = Tokenizer.from_str(json.dumps(definition))
    plain.encode_special_tokens = True
    local = (
        definition["normalizer"] is None
        and all(token["special"] for token in definition["added_tokens"])
        and definition["model"]["type"] == "BPE"
        and not definition["model"].get("dropout")
        and _splits_locally(definition["pre_tokenizer"])
    )
    return plain, local


def _splits_locally(part: dict[str, Any] | None) -> bool:
    """Whether the text after the last few pre-tokens can be tokenised by itself."""
    if part is None:
        return False
    if part["type"] == "ByteLevel":
        return bool(part.get("use_regex", True)) and not part["add_prefix_space"]
    if part["type"] != "Sequence" or len(part["pretokenizers"]) != 2:
        return False
    first, second = part["pretokenizers"]
    if first["type"] != "Split" or second["type"] != "ByteLevel":
        return False
    if first["behavior"] != "Isolated" or first["invert"] or "Regex" not in first["pattern"]:
        return False
    if second["add_prefix_space"] or second.get("use_regex", True):
        return False
    pattern = _CONTRACTIONS.sub("", first["pattern"]["Regex"])
    pattern = pattern.replace("++", "+").replace("?+", "?")
    for variant, usual in ((r"\p{N}{1,3}", r"\p{N}"), (r"[\r\n/]*", r"[\r\n]*")):
        pattern = pattern.replace(variant, usual)
    return pattern in _LOCAL_PATTERNS
