"""``VocabularyMap``: projects a calibrator's distributions to the vocabulary of a target."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_detox.errors import VocabularyError
from fusion_detox.vocabulary.build import build_static, calibrator_token_bytes
from fusion_detox.vocabulary.disk_cache import (
    FORMAT_VERSION,
    cache_folder,
    load_map,
    save_map,
    usable_folder,
)
from fusion_detox.vocabulary.factors import CalibratorLike, model_digest
from fusion_detox.vocabulary.healing import HealingTables
from fusion_detox.vocabulary.token_table import ENGLISH, TokenTable, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mode = Literal["prefix", "transfer"]

# Numbers that a sparse product transposes at a time, so that they stay in the CPU's cache.
_BLOCK = 1 << 18
# The few tokens that very many calibrator tokens begin with, such as " ", are mapped by a dense
# product: at most this many, and those with more than this many calibrator tokens.
_DENSE_TOKENS, _DENSE_FROM = 32, 64


class Cover(NamedTuple):
    """One way to continue a text: the next calibrator token begins at or before the text's end.

    Attributes:
        row: Row of the result that the cover belongs to.
        position: Index of the calibrator's distribution that predicts that token.
        remainder: The bytes from the beginning of that token to the text's end.
    """

    row: int
    position: int
    remainder: bytes


class Distributions(NamedTuple):
    """Values at numbered positions, such as next-token probabilities, without copying them.

    Attributes:
        blocks: Each ``(distributions, columns, width)``, all on one device.
        block: Of each position, the index of its block.
        column: Of each position, its column in that block.
    """

    blocks: list[Tensor]
    block: list[int]
    column: list[int]

    @classmethod
    def of(cls, values: Tensor) -> Distributions:
        """Positions in the order of the columns of one ``(distributions, positions, width)``."""
        count = values.shape[1]
        return cls([values], [0] * count, list(range(count)))

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.blocks[0].device

    def rows(self, positions: Sequence[int]) -> Tensor:
        """``(distributions, positions, width)``; a view of a block if possible."""
        blocks = [self.block[position] for position in positions]
        columns = [self.column[position] for position in positions]
        if not columns:
            return self.blocks[0][:, :0]
        if blocks.count(blocks[0]) < len(blocks):
            pairs = zip(blocks, columns, strict=True)
            return torch.stack([self.blocks[block][:, column] for block, column in pairs], 1)
        held, first = self.blocks[blocks[0]], columns[0]
        if columns == list(range(first, first + len(columns))):
            return held[:, first : first + len(columns)]
        return held.index_select(1, torch.tensor(columns, device=held.device))

    def at(self, positions: NDArray[np.int64], indices: NDArray[np.int64]) -> Tensor:
        """Single values.

        Args:
            positions: ``(n,)``.
            indices: ``(n,)`` indices into the blocks' last dimension.

        Returns:
            ``(distributions, n)``.
        """
        flat = np.array(self.column)[positions] * self.blocks[0].shape[-1] + indices
        if len(self.blocks) == 1:
            where = torch.from_numpy(flat).to(self.device)
            return self.blocks[0].flatten(1).index_select(1, where)
        blocks = np.array(self.block)[positions]
        result = self.blocks[0].new_empty(len(self.blocks[0]), len(flat))
        for number, held in enumerate(self.blocks):
            (here,) = np.nonzero(blocks == number)
            if len(here):
                where = torch.from_numpy(flat[here]).to(held.device)
                values = held.flatten(1).index_select(1, where)
                result.index_copy_(1, torch.from_numpy(here).to(held.device), values)
        return result


class _Matrix(NamedTuple):
    """A sparse matrix ``(target tokens, calibrator tokens)`` by rows."""

    pointers: Tensor
    columns: Tensor
    values: Tensor

    def apply(self, dense: Tensor) -> Tensor:
        """Map ``(rows, calibrator tokens)`` to ``(rows, target tokens)``."""
        transposed = dense.t().contiguous()
        size = len(self.pointers) - 1
        result = dense.new_empty(len(dense), size)
        step = size if dense.device.type != "cpu" else max(1, _BLOCK // max(1, len(dense)))
        bounds = [*range(0, size, step), size]
        edges: list[int] = self.pointers[bounds].tolist()
        # As fast as a CSR product for one row and several times faster for 32 rows.
        for (low, high), (begin, end) in zip(pairwise(bounds), pairwise(edges), strict=True):
            bags = torch.nn.functional.embedding_bag(
                self.columns[begin:end],
                transposed,
                self.pointers[low : high + 1] - begin,
                mode="sum",
                per_sample_weights=self.values[begin:end],
                include_last_offset=True,
            )
            result[:, low:high] = bags.t()
        return result


class _Dense(NamedTuple):
    """What a dense product computes.

    Attributes:
        weights: ``(calibrator tokens, 1 + tokens)``: first 1 for each usable calibrator token, then
            the rows of the sparse matrix that have the most entries.
        tokens: ``(3, target tokens)``, for each token: its column in ``weights``, or 0; where its
            entries in the sparse matrix begin; their number, or 0 if it has a column.
    """

    weights: Tensor
    tokens: Tensor


class VocabularyMap:
    """Projects next-token distributions of a calibrator to a target's tokens.

    If both vocabularies agree id for id, the map is the identity. Otherwise it is one static sparse
    matrix per mode, the same for all distributions, plus token healing: if the text may end inside
    a calibrator token, the tokens that continue it count as well, each weighted by its probability
    at its own beginning (covers: Vieira et al. 2024; Hayase et al. 2025).

    Attributes:
        kind: ``"identity"`` or ``"projection"``.
        coverage: Share of the target tokens of an English sample that are mapped, in 0..1.
        build_seconds: Time that ``build`` took, including loading from the disk cache.
        mapped: ``(target tokens,)`` bool, the tokens that the calibrator can score.
        from_cache: Whether the static part came from the disk cache.
    """

    def __init__(
        self, calibrator: CalibratorLike, target: TokenTable, static: dict[str, Tensor] | None
    ) -> None:
        """Call ``build`` instead."""
        self._token_bytes = calibrator_token_bytes(calibrator)
        self._size = len(target.token_bytes)
        self._static = static or {}
        self._on_device: dict[torch.device, tuple[dict[str, _Matrix], Tensor]] = {}
        self._dense_on: dict[tuple[torch.device, Mode], _Dense] = {}
        self.from_cache = False
        self.coverage = self.build_seconds = 0.0
        self.kind: Literal["identity", "projection"] = "projection" if static else "identity"
        if static is None:
            width = len(self._token_bytes)
            self.mapped = torch.tensor(
                [text is not None and i < width for i, text in enumerate(target.token_bytes)]
            )
        else:
            self.mapped = static["prefix_ptr"].diff() > 0
            self._tables = HealingTables(
                self._token_bytes,
                calibrator.tokens.byte_ids,
                target,
                static["split_ptr"],
                static["split_ids"],
            )

    @classmethod
    def build(
        cls,
        calibrator: CalibratorLike,
        target_tokens: TokenTable,
        target_tokenizer: PreTrainedTokenizerBase,
        *,
        cache_dir: Path | None = None,
        use_cache: bool = True,
        minimum_coverage: float = 0.98,
    ) -> VocabularyMap:
        """Build the map from a calibrator's vocabulary to a target's, or load it from the cache.

        Args:
            calibrator: Its clean model, tokenizer and token table are used.
            target_tokens: The target tokenizer's table.
            target_tokenizer: The target's tokenizer, which splits the calibrator's tokens.
            cache_dir: Folder of the disk cache; by default ``$FUSION_DETOX_CACHE`` or
                ``fusion-detox/maps`` in the user's cache.
            use_cache: Whether to read and write the disk cache.
            minimum_coverage: Smallest coverage to accept, in 0..1.

        Raises:
            VocabularyError: The coverage is less than ``minimum_coverage``.
        """
        started = time.perf_counter()
        static = path = cached = None
        if not _agree(calibrator_token_bytes(calibrator), target_tokens.token_bytes):
            if use_cache and usable_folder(folder := cache_folder(cache_dir)):
                key = _key(calibrator, target_tokens, target_tokenizer)
                path = folder / f"{key}.safetensors"
                rows, columns = len(target_tokens.token_bytes), calibrator.vocabulary_size
                cached = load_map(path, rows, columns)
            static = (
                cached[0] if cached else build_static(calibrator, target_tokens, target_tokenizer)
            )
        result = cls(calibrator, target_tokens, static)
        result.from_cache = cached is not None
        result.coverage = cached[1] if cached else _coverage(result.mapped, target_tokenizer)
        if path and static and not cached:
            save_map(path, static, result.coverage)
        result.build_seconds = time.perf_counter() - started
        if result.coverage < minimum_coverage:
            raise VocabularyError(
                f"The calibrator covers only {result.coverage:.2%} of the target's tokens in "
                f"English text, but at least {minimum_coverage:.2%} are required. Train a "
                "calibrator whose tokenizer covers the target's characters, as byte-level BPE does."
            )
        return result

    def to(self, device: torch.device | str) -> VocabularyMap:
        """Copy the static part to a device before its first use there."""
        if self.kind == "projection":
            self._matrices(torch.device(device))
        return self

    def project(
        self, probs: Tensor, covers: Sequence[Cover], weights: Tensor, rows: int, *, mode: Mode
    ) -> Tensor:
        """Project distributions over the calibrator's tokens to the target's tokens.

        Args:
            probs: ``(distributions, positions, V_C)`` float32 next-token probabilities.
            covers: Per row, one cover without remainder, unless the text ends inside a character,
                and any number of covers with one.
            weights: ``(distributions, covers)`` probability of the calibrator tokens before the one
                that each cover begins; only the proportions within a row matter.
            rows: Number of rows.
            mode: ``"transfer"`` gives the probability that the next target token is this one, which
                sums to 1 over the mapped tokens. ``"prefix"`` gives the probability that the text
                continues with the token's bytes, which never grows with more bytes and has no fixed
                sum.

        Returns:
            ``(distributions, rows, V_T)`` float32 on the device of ``probs``. A row is all zeros if
            none of its covers can be continued. For the identity, exactly ``probs``, padded with
            zeros if the target is wider.
        """
        device = probs.device
        kept, row, positions = _whole(covers)
        if self.kind == "identity":
            result = probs.new_zeros(probs.shape[0], rows, self._size)
            width = min(self._size, probs.shape[-1])
            result[:, row, :width] = probs[:, positions, :width]
            return result

        matrices, usable = self._matrices(device)
        mixed = probs.new_zeros(len(probs), rows, probs.shape[-1])
        weighted = probs[:, positions] * weights[:, kept, None]
        mixed.index_add_(1, torch.tensor(row, device=device, dtype=torch.long), weighted)
        total = mixed @ usable
        healed = self._heal(total, Distributions.of(probs), covers, weights, mode)
        # Scale here: the target's vocabulary is usually many times larger.
        scale = torch.where(total > torch.finfo(total.dtype).tiny, 1 / total, 0.0)
        result = matrices[mode].apply((mixed * scale[..., None]).flatten(0, 1))
        result = result.view(len(probs), rows, self._size)
        if healed is not None:
            row_of, targets, values = healed
            where = row_of * self._size + targets
            _add(result.flatten(1), where, values * scale[:, row_of])
        return result

    def gather(
        self,
        probs: Distributions,
        covers: Sequence[Cover],
        weights: Tensor,
        places: Tensor,
        shape: tuple[int, int],
        *,
        mode: Mode,
    ) -> Tensor:
        """The columns of ``project`` for some tokens of each row, at the cost of those alone.

        Args:
            probs: Float32 next-token probabilities over the calibrator's tokens.
            covers: See :meth:`project`.
            weights: See :meth:`project`.
            places: ``(n,)`` ascending ``row * vocab + token``; only mapped tokens.
            shape: ``(rows, vocab)``; the vocabulary may be wider or narrower than the map.
            mode: See :meth:`project`.

        Returns:
            ``(distributions, n)`` float32 on the device of ``probs``.
        """
        device, (rows, width) = probs.device, shape
        row, token = places // width, places % width
        kept, whole, positions = _whole(covers)
        if whole:
            own = probs.rows(positions)  # of the rows that have a cover without remainder
        else:
            own = probs.blocks[0].new_zeros(len(probs.blocks[0]), 1, probs.blocks[0].shape[-1])
        size, flat = own.shape[-1], own.flatten(1)
        result: Tensor
        share = weights if self.kind == "projection" else torch.ones_like(weights)
        in_order = whole == list(range(rows))
        if in_order:
            order, share = row, share if len(kept) == len(covers) else share[:, kept]
        else:
            of_row = torch.zeros(rows, dtype=torch.long)
            of_row[whole] = torch.arange(len(whole))
            of_row = of_row.to(device)
            order, where = of_row[row], torch.tensor(whole, device=device, dtype=torch.long)
            share = share.new_zeros(len(share), rows).index_copy_(1, where, share[:, kept])
        start = order * size
        if self.kind == "identity":
            result = flat.index_select(1, start + token.clamp_max(size - 1))
            return result * share.index_select(1, row) * (token < size)

        matrix, dense = self._matrices(device)[0][mode], self._dense(device, mode)
        sums = (own.flatten(0, 1) @ dense.weights).view(len(own), -1)
        each = dense.weights.shape[1]
        total = (sums[:, ::each] if in_order else sums[:, ::each].index_select(1, of_row)) * share
        healed = self._heal(total, probs, covers, weights, mode)
        scale = torch.where(total > torch.finfo(total.dtype).tiny, 1 / total, 0.0)
        column, first, lengths = dense.tokens.index_select(1, token)
        result = sums.index_select(1, order * each + column) * (column > 0)
        owner = torch.repeat_interleave(lengths)
        # Of each entry: where its token's entries begin, less the number of entries before those.
        skipped = (first - lengths.cumsum(0) + lengths).index_select(0, owner)
        entry = torch.arange(len(owner), device=device) + skipped
        source = start.index_select(0, owner) + matrix.columns.index_select(0, entry)
        _add(result, owner, flat.index_select(1, source) * matrix.values.index_select(0, entry))
        result *= (share * scale).index_select(1, row)
        if healed is not None:
            row_of, targets, values = healed
            wanted = row_of * width + targets
            place = torch.searchsorted(places, wanted).clamp_max(len(places) - 1)
            match = ((places[place] == wanted) & (targets < width)).nonzero().view(-1)
            scaled = values[:, match] * scale.index_select(1, row_of[match])
            _add(result, place[match], scaled)
        return result

    def _dense(self, device: torch.device, mode: Mode) -> _Dense:
        """The dense part of ``gather``, made on first use."""
        found = self._dense_on.get((device, mode))
        if found is None:
            matrices, usable = self._matrices(device)
            pointers, columns, values = matrices[mode]
            lengths = pointers.diff()
            most = lengths.topk(min(_DENSE_TOKENS, len(lengths))).indices
            most = most[lengths[most] > _DENSE_FROM]
            weights = usable.new_zeros(1 + len(most), len(usable))
            weights[0] = usable
            for number, token in enumerate(most.tolist(), 1):
                part = slice(int(pointers[token]), int(pointers[token + 1]))
                weights[number].index_add_(0, columns[part].long(), values[part])
            column = torch.zeros_like(lengths, dtype=torch.long)
            column[most] = torch.arange(1, 1 + len(most), device=device)
            tokens = [column, pointers[:-1], torch.where(column > 0, 0, lengths)]
            found = _Dense(weights.t().contiguous(), torch.stack([one.long() for one in tokens]))
            self._dense_on[device, mode] = found
        return found

    def _heal(
        self,
        total: Tensor,
        probs: Distributions,
        covers: Sequence[Cover],
        weights: Tensor,
        mode: Mode,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The contribution of covers with a remainder: rows, target ids, and masses.

        The masses have the shape ``(distributions, n)``. Adds them up in ``total``, in place.
        """
        chosen, healings = [], []
        for n, cover in enumerate(covers):
            if cover.remainder and len((healing := self._tables.table(cover.remainder)).tokens):
                chosen.append(n)
                healings.append(healing)
        if not chosen:
            return None
        device = total.device
        lengths = [len(healing.tokens) for healing in healings]
        cover_of = np.repeat(np.array(chosen), lengths)
        rows = np.array([cover.row for cover in covers])[cover_of]
        row_of = torch.from_numpy(rows).to(device)
        position_of = np.array([cover.position for cover in covers])[cover_of]
        tokens = np.concatenate([healing.tokens.numpy() for healing in healings])
        led = weights.index_select(1, torch.from_numpy(cover_of).to(device))
        values = probs.at(position_of, tokens) * led
        _add(total, row_of, values)
        if mode == "transfer":
            return row_of, torch.cat([healing.following for healing in healings]).to(device), values
        starts = (np.cumsum(lengths) - lengths).tolist()
        owners = torch.cat(
            [healing.owners + start for healing, start in zip(healings, starts, strict=True)]
        ).to(device)
        targets = torch.cat([healing.prefixes for healing in healings]).to(device)
        return row_of[owners], targets, values[:, owners]

    def _matrices(self, device: torch.device) -> tuple[dict[str, _Matrix], Tensor]:
        """The matrices on a device, and a 0/1 mask of the calibrator tokens that they use."""
        if device not in self._on_device:
            matrices = {
                mode: _Matrix(
                    *(
                        self._static[f"{mode}_{part}"].to(device)
                        for part in ("ptr", "ids", "values")
                    )
                )
                for mode in ("prefix", "transfer")
            }
            usable = torch.zeros(len(self._token_bytes), device=device, dtype=torch.float32)
            usable[matrices["transfer"].columns.long()] = 1.0
            self._on_device[device] = matrices, usable
        return self._on_device[device]


def _whole(covers: Sequence[Cover]) -> tuple[list[int], list[int], list[int]]:
    """The covers without a remainder: their indices, rows and positions."""
    found = [(n, *cover[:2]) for n, cover in enumerate(covers) if not cover.remainder]
    index, rows, positions = ([each[part] for each in found] for part in range(3))
    return index, rows, positions


def _add(sums: Tensor, index: Tensor, values: Tensor) -> None:
    """Adds columns of ``values`` to the indexed columns of ``sums``, both of two dimensions."""
    # index_add_ along an inner dimension is far slower than in one dimension.
    for own, added in zip(sums, values, strict=True):
        own.index_add_(0, index, added)


def _agree(own: tuple[bytes | None, ...], target: tuple[bytes | None, ...]) -> bool:
    """Whether both have the same bytes for every id, apart from trailing ids without bytes."""
    common = min(len(own), len(target))
    return own[:common] == target[:common] and not any(own[common:]) and not any(target[common:])


def _coverage(mapped: Tensor, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of an English sample's tokens that are mapped."""
    (ids,) = encode(tokenizer, [ENGLISH])
    return mapped[torch.tensor(ids)].double().mean().item() if ids else 0.0


def _key(calibrator: CalibratorLike, tokens: TokenTable, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything a map depends on: vocabularies, their splits, and the static factors."""
    parts: list[object] = [FORMAT_VERSION, calibrator.vocabulary_size, calibrator.bos_id]
    parts += [calibrator.tokens.fingerprint(), tokens.fingerprint(), model_digest(calibrator)]
    parts += [encode(calibrator.tokenizer, [ENGLISH]), encode(tokenizer, [ENGLISH])]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
