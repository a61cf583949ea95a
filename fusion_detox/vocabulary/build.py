"""The static part of a vocabulary map: which target tokens each calibrator token supports."""

from __future__ import annotations

from array import array
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fusion_detox.vocabulary.factors import CalibratorLike, from_array, static_factors
from fusion_detox.vocabulary.token_table import ByteIndex, TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Long target tokens together take at most this share of their first calibrator token's probability.
_MAX_TAKEN = 0.999
_FEW_NON_ASCII = 0.01


def calibrator_token_bytes(calibrator: CalibratorLike) -> tuple[bytes | None, ...]:
    """The calibrator's token bytes, cut or padded to the width of its distributions."""
    found = calibrator.tokens.token_bytes[: calibrator.vocabulary_size]
    return found + (None,) * (calibrator.vocabulary_size - len(found))


def build_static(
    calibrator: CalibratorLike,
    target_tokens: TokenTable,
    target_tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Tensor]:
    """Compute all tensors of a map that are stored on disk.

    Returns:
        ``prefix_*`` and ``transfer_*``: sparse matrices ``(target tokens, calibrator tokens)`` as
        row pointers, column ids and values. ``split_ptr`` and ``split_ids``: the target's
        tokenisation of each calibrator token, empty if there is none.
    """
    token_bytes = calibrator_token_bytes(calibrator)
    own = ByteIndex(token_bytes, calibrator.tokens.byte_ids)
    target = ByteIndex(target_tokens.token_bytes, target_tokens.byte_ids)
    known = [(j, text) for j, text in enumerate(token_bytes) if text is not None]
    splits: list[tuple[int, ...]] = [()] * len(token_bytes)
    first: list[int | None] = [None] * len(token_bytes)
    found = target_tokens.split(target_tokenizer, [text for _, text in known])
    for (j, text), split in zip(known, found, strict=True):
        splits[j] = split or ()
        first[j] = split[0] if split else target.longest_prefix(text)

    places, paths = _long_tokens(calibrator, own, target, len(token_bytes))
    factors = static_factors(calibrator, paths, _subtrees(token_bytes))
    heads = [path[0] for path in paths]
    exact, continued = (_Long(places, heads, factor.tolist()) for factor in factors)
    parents = _parents(target.sorted)
    size = (len(target_tokens.token_bytes), len(token_bytes))
    return {
        **_csr("prefix", size, _prefix_entries(token_bytes, target, parents, continued)),
        **_csr("transfer", size, _transfer_entries(first, target, parents, exact)),
        "split_ptr": _pointers(torch.tensor([len(split) for split in splits])),
        "split_ids": from_array(array("i", chain.from_iterable(splits))),
    }


def _long_tokens(
    calibrator: CalibratorLike, own: ByteIndex, target: ByteIndex, width: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Target tokens that span several calibrator tokens: places in byte order, and those tokens."""
    non_ascii = sum(len(text) > 1 and not text.isascii() for text in own.ids)
    # For scripts that the calibrator represents as bytes, longest match is as good and faster.
    exactly = non_ascii > _FEW_NON_ASCII * len(own.ids)
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
    """Target tokens that span several calibrator tokens, in byte order."""

    places: list[int]  # in the target's sorted byte strings
    heads: list[int]  # first calibrator token of each
    factors: list[float]  # probability of the remaining calibrator tokens


def _prefix_entries(
    token_bytes: tuple[bytes | None, ...], target: ByteIndex, parents: list[int], long: _Long
) -> _Entries:
    """Entries of the "prefix" matrix: how much each calibrator token supports each target token.

    A calibrator token supports every target token that it starts with. The first calibrator token
    of a longer target token supports it with a weight, the static factor. Target tokens of lengths
    in between get the largest such factor, so no token's mass exceeds that of any of its prefixes.
    """
    rows, columns, values = array("i"), array("i"), array("f")
    for j, text in enumerate(token_bytes):
        if text is not None:
            rows.extend(found := target.prefixes(text))
            columns.extend([j] * len(found))
    values.extend([1.0] * len(rows))
    largest: dict[tuple[int, int], float] = {}
    for place, head, factor in zip(*long, strict=True):
        shortest = len(token_bytes[head] or b"")
        while place >= 0 and len(target.sorted[place]) > shortest:
            if largest.get((place, head), -1.0) >= factor:
                break  # the shorter ones have at least this factor too
            largest[place, head] = factor
            place = parents[place]
    for (place, head), factor in largest.items():
        for i in target.all_ids(target.sorted[place]):
            rows.append(i)
            columns.append(head)
            values.append(factor)
    return rows, columns, values


def _transfer_entries(
    first: list[int | None], target: ByteIndex, parents: list[int], long: _Long
) -> _Entries:
    """Entries of the "transfer" matrix: where each calibrator token's probability goes.

    Every column sums to 1. The probability goes to the first token of the target's tokenisation,
    minus the shares of long target tokens that no calibrator token reaches. The share of a long
    token excludes the shares of even longer tokens that begin with it (a Moebius inversion over
    prefixes).
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
    scale = [min(1.0, _MAX_TAKEN / total) if total else 1.0 for total in taken]

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
    """For each of the sorted texts, the place of the longest other one it starts with, or -1."""
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


def _subtrees(token_bytes: tuple[bytes | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids in byte order; and for each id, start and stop of the tokens that begin with its bytes.

    Ids without bytes come last, each in a range of its own.
    """
    order = sorted(
        range(len(token_bytes)), key=lambda j: (token_bytes[j] is None, token_bytes[j] or b"", j)
    )
    texts = [text for j in order if (text := token_bytes[j]) is not None]
    stop = list(range(1, len(order) + 1))
    for place, parent in reversed(list(enumerate(_parents(texts)))):
        if parent >= 0:
            stop[parent] = max(stop[parent], stop[place])
    by_id = torch.argsort(torch.tensor(order))
    return torch.tensor(order), by_id, torch.tensor(stop)[by_id]
