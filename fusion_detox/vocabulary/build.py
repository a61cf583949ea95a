"""The static part of a vocabulary map: which target tokens each calibrator token supports."""

from __future__ import annotations

from array import array
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from fusion_detox.vocabulary.byte_index import ByteIndex
from fusion_detox.vocabulary.factors import Paths, from_array, static_factors
from fusion_detox.vocabulary.sample_text import ENGLISH
from fusion_detox.vocabulary.token_table import TokenTable, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Long target tokens together take at most this much of the calibrator token they begin with.
_LARGEST_SHARE = 0.999
_FEW_FOREIGN = 0.01


class CalibratorLike(Protocol):
    """What the map needs of a calibrator."""

    clean: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: TokenTable
    vocabulary_size: int
    bos_id: int


def calibrator_token_bytes(calibrator: CalibratorLike) -> tuple[bytes | None, ...]:
    """The calibrator's pieces, exactly as many as its distributions are wide."""
    pieces = calibrator.tokens.token_bytes[: calibrator.vocabulary_size]
    return pieces + (None,) * (calibrator.vocabulary_size - len(pieces))


def english_coverage(mapped: Tensor, target_tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of an English sample's target tokens that the map reaches."""
    (ids,) = encode(target_tokenizer, [ENGLISH])
    return mapped[torch.tensor(ids)].double().mean().item() if ids else 0.0


def build_static(
    calibrator: CalibratorLike,
    target_tokens: TokenTable,
    target_tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Tensor]:
    """Computes all tensors that a map keeps on disk.

    Returns:
        ``prefix_*`` and ``transfer_*``: sparse matrices ``(target tokens, calibrator tokens)`` as
        row pointers, column ids and values. ``split_ptr`` and ``split_ids``: the target's own
        tokenisation of each calibrator token, empty where it has none.
    """
    pieces = calibrator_token_bytes(calibrator)
    own = ByteIndex.of(pieces, calibrator.tokens.byte_ids)
    target = ByteIndex.of(target_tokens.token_bytes, target_tokens.byte_ids)
    known = [j for j, piece in enumerate(pieces) if piece is not None]
    splits: list[tuple[int, ...]] = [()] * len(pieces)
    found = target_tokens.split(target_tokenizer, [pieces[j] or b"" for j in known])
    for j, split in zip(known, found, strict=True):
        splits[j] = split or ()
    first = [
        split[0] if split else target.longest_prefix(piece) if piece else None
        for piece, split in zip(pieces, splits, strict=True)
    ]

    places, paths = _spell_longer(calibrator, own, target, len(pieces))
    factors = static_factors(calibrator, Paths.of(paths), _subtrees(pieces))
    heads = [path[0] for path in paths]
    exact, goes_on = (_Long(places, heads, factor.tolist()) for factor in factors)
    parents = _parents(target.sorted)
    size = (len(target_tokens.token_bytes), len(pieces))
    return {
        **_csr("prefix", size, _prefix_entries(pieces, target, parents, goes_on)),
        **_csr("transfer", size, _transfer_entries(first, target, parents, exact)),
        "split_ptr": _pointers(torch.tensor([len(split) for split in splits])),
        "split_ids": from_array(array("i", chain.from_iterable(splits))),
    }


def _spell_longer(
    calibrator: CalibratorLike, own: ByteIndex, target: ByteIndex, width: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Target tokens that are no single calibrator token, in the calibrator's tokenisation."""
    foreign = sum(len(text) > 1 and not text.isascii() for text in own.ids)
    # Longest match is as good, and quicker, for scripts that the calibrator writes in bytes.
    exactly = foreign > _FEW_FOREIGN * len(own.ids)
    longer = [n for n, text in enumerate(target.sorted) if text not in own.ids]
    chosen = [n for n in longer if exactly or target.sorted[n].isascii()]
    texts = [target.sorted[n] for n in chosen]
    splits = calibrator.tokens.split(calibrator.tokenizer, texts)
    known = {n: split for n, split in zip(chosen, splits, strict=True) if split}
    places: list[int] = []
    paths: list[tuple[int, ...]] = []
    for n in longer:
        path = known.get(n)
        if path is None or max(path) >= width:
            path = own.greedy(target.sorted[n])
        if path and len(path) > 1:
            places.append(n)
            paths.append(path)
    return places, paths


_Entries = tuple["array[int]", "array[int]", "array[float]"]


class _Long(NamedTuple):
    """Target tokens that take several calibrator tokens, in byte order."""

    places: list[int]  # in the target's sorted bytes
    heads: list[int]  # the first calibrator token of each
    factors: list[float]  # probability of the others after it


def _prefix_entries(
    pieces: tuple[bytes | None, ...], target: ByteIndex, parents: list[int], long: _Long
) -> _Entries:
    """What each calibrator token says about "the text goes on with these bytes".

    A calibrator token supports every target token that it starts with. A longer target token is
    supported by the first of its calibrator tokens times its static factor, and so are the target
    tokens in between, by the largest such factor: so no token's mass exceeds that of a prefix.
    """
    rows, columns, values = array("i"), array("i"), array("f")
    for j, piece in enumerate(pieces):
        if piece is not None:
            rows.extend(found := target.prefixes(piece))
            columns.extend([j] * len(found))
    values.extend([1.0] * len(rows))
    largest: dict[tuple[int, int], float] = {}
    for place, head, factor in zip(*long, strict=True):
        shortest = len(pieces[head] or b"")
        while place >= 0 and len(target.sorted[place]) > shortest:
            if largest.get((place, head), -1.0) >= factor:
                break  # and so it is for all shorter ones
            largest[place, head] = factor
            place = parents[place]
    for (place, head), factor in largest.items():
        text = target.sorted[place]
        for i in (target.ids[text], *target.twins.get(text, ())):
            rows.append(i)
            columns.append(head)
            values.append(factor)
    return rows, columns, values


def _transfer_entries(
    first: list[int | None], target: ByteIndex, parents: list[int], long: _Long
) -> _Entries:
    """Where each calibrator token's probability goes, so that each column sums to 1.

    All of it goes to the first target token of its tokenisation, less the shares of long target
    tokens that no calibrator token reaches. A share leaves out what goes to longer tokens still
    that begin alike (a Moebius inversion over prefixes).
    """
    reached = {i for i in first if i is not None}
    ids = [target.ids[text] for text in target.sorted]
    head_of: list[int | None] = [None] * len(ids)
    shares = [0.0] * len(ids)
    for place, head, factor in zip(*long, strict=True):
        if ids[place] in reached or first[head] is None:
            continue
        head_of[place] = head
        shares[place] = factor
        parent = parents[place]
        while parent >= 0 and head_of[parent] != head:
            parent = parents[parent]
        if parent >= 0:
            shares[parent] -= factor
    taken = [0.0] * len(first)
    for head_at, share in zip(head_of, shares, strict=True):
        if head_at is not None:
            taken[head_at] += max(share, 0.0)
    scale = [min(1.0, _LARGEST_SHARE / total) if total else 1.0 for total in taken]

    rows, columns, values = array("i"), array("i"), array("f")
    for i, head_at, share in zip(ids, head_of, shares, strict=True):
        if head_at is not None and share > 0.0:
            rows.append(i)
            columns.append(head_at)
            values.append(share * scale[head_at])
    for j, token in enumerate(first):
        if token is not None:
            rows.append(token)
            columns.append(j)
            values.append(1.0 - taken[j] * scale[j])
    return rows, columns, values


def _parents(texts: list[bytes]) -> list[int]:
    """For each of sorted texts the place of the longest other one that it starts with, or -1."""
    parents: list[int] = []
    for place, text in enumerate(texts):
        parent = place - 1
        while parent >= 0 and not text.startswith(texts[parent]):
            parent = parents[parent]
        parents.append(parent)
    return parents


def _csr(name: str, size: tuple[int, int], entries: _Entries) -> dict[str, Tensor]:
    rows, columns, values = (from_array(entry) for entry in entries)
    order = torch.argsort(rows.long() * size[1] + columns)
    return {
        f"{name}_ptr": _pointers(torch.bincount(rows, minlength=size[0])),
        f"{name}_ids": columns[order].to(torch.int32),
        f"{name}_values": values[order].to(torch.float32),
    }


def _pointers(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _subtrees(pieces: tuple[bytes | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids in byte order, and for each id where in it the tokens that start with it begin and end.

    Ids without bytes come last and stand for themselves.
    """
    order = sorted(range(len(pieces)), key=lambda j: (pieces[j] is None, pieces[j] or b"", j))
    texts = [piece for j in order if (piece := pieces[j]) is not None]
    stop = list(range(1, len(pieces) + 1))
    for place, parent in reversed(list(enumerate(_parents(texts)))):
        if parent >= 0:
            stop[parent] = max(stop[parent], stop[place])
    by_id = torch.argsort(torch.tensor(order))
    return torch.tensor(order), by_id, torch.tensor(stop)[by_id]
