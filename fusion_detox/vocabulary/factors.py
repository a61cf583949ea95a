"""How probable the rest of a long target token is once the calibrator has begun it."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNIGRAM_ROWS = 256
_MOST_ROWS = 2048
_BATCH = 128
# Multiply-adds spent on the pairs of tokens: well below a second of one CPU core.
_WORK = 10_000_000_000


class _Model(Protocol):
    clean: PreTrainedModel
    vocabulary_size: int
    bos_id: int


@dataclasses.dataclass(frozen=True)
class Paths:
    """Token paths, laid out as their neighbouring pairs.

    Attributes:
        count: Number of paths.
        owner: ``(pairs,)`` the path that a pair belongs to.
        previous: ``(pairs,)`` first token of each pair.
        following: ``(pairs,)`` second token of each pair.
        last: ``(pairs,)`` bool, whether it ends its path.
        heads: ``(count,)`` first token of each path.
    """

    count: int
    owner: Tensor
    previous: Tensor
    following: Tensor
    last: Tensor
    heads: Tensor

    @classmethod
    def of(cls, paths: Sequence[tuple[int, ...]]) -> Paths:
        """Lays out paths of at least two tokens each."""
        flat = from_array(array("q", chain.from_iterable(paths)))
        lengths = from_array(array("q", map(len, paths)))
        owner = torch.repeat_interleave(torch.arange(len(paths)), lengths)
        inside = owner[1:] == owner[:-1]
        ends = torch.ones(len(flat), dtype=torch.bool)
        ends[:-1] = ~inside
        return cls(
            len(paths),
            owner[1:][inside],
            flat[:-1][inside],
            flat[1:][inside],
            ends[1:][inside],
            flat[lengths.cumsum(0) - lengths],
        )


def from_array(values: array[Any]) -> Tensor:
    """A tensor of an array's values; far quicker than ``torch.tensor`` on long ones."""
    dtype = {"i": torch.int32, "q": torch.int64, "f": torch.float32}[values.typecode]
    return torch.frombuffer(values, dtype=dtype).clone() if values else torch.empty(0, dtype=dtype)


@torch.no_grad()
def static_factors(
    calibrator: _Model, paths: Paths, subtrees: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Probability of all tokens of each path after its first, whatever stands before.

    A product over neighbouring tokens: the clean model's next-token law after BOS and the first
    of the two for the pairs that matter most, its average law for the others. One factor serves
    both distributions, so that what is approximate about it cancels in their difference.

    Args:
        calibrator: Its ``clean`` model is run on some thousand rows of two tokens.
        paths: Calibrator tokens of the long target tokens.
        subtrees: Ids in byte order, and each id's range of tokens that start with it.

    Returns:
        Twice ``(paths,)``: the probability of exactly these tokens, and the probability that the
        text goes on with their bytes, where the last token stands for all that start with it.
    """
    order, start, stop = subtrees
    if paths.count == 0:
        return torch.zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.float32)
    ((_, opening),) = _next_laws(calibrator, torch.tensor([], dtype=torch.long))
    common = opening[0].topk(min(_UNIGRAM_ROWS, opening.shape[-1]))
    average = torch.zeros_like(opening[0])
    for at, laws in _next_laws(calibrator, common.indices):
        average += common.values[at] @ laws
    average = average / average.sum()

    exact = average[paths.following].log()
    end = paths.following
    first_row = torch.zeros_like(end)
    goes_on = _range_mass(average[None, order], first_row, start[end], stop[end]).log()
    weight = average[paths.heads].log().index_add(0, paths.owner, exact).exp()
    importance = torch.zeros_like(average).index_add_(0, paths.previous, weight[paths.owner])
    size = sum(parameter.numel() for parameter in calibrator.clean.parameters())
    limit = min(max(_WORK // (2 * size + 1), _UNIGRAM_ROWS), _MOST_ROWS)
    limit = min(limit, int((importance > 0).sum()))
    chosen = importance.topk(limit).indices.sort().values

    # Pairs in the order of their first token, so that each batch of rows owns a slice of them.
    pairs = torch.argsort(paths.previous)
    sorted_previous = paths.previous[pairs].contiguous()
    for at, laws in _next_laws(calibrator, chosen):
        tokens = chosen[at]
        low = torch.searchsorted(sorted_previous, tokens)
        count = torch.searchsorted(sorted_previous, tokens, right=True) - low
        row = torch.repeat_interleave(torch.arange(len(tokens)), count)
        offset = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        mine = pairs[low[row] + offset]
        exact[mine] = laws[row, paths.following[mine]].log()
        mass = laws[:, order].double().cumsum(-1)
        mass = torch.nn.functional.pad(mass, (1, 0))
        end = paths.following[mine]
        goes_on[mine] = (
            (mass[row, stop[end]] - mass[row, start[end]]).clamp_min(1e-30).log().float()
        )
    goes_on = torch.where(paths.last, goes_on, exact)
    zero = torch.zeros(paths.count, dtype=torch.float32)
    return (
        zero.index_add(0, paths.owner, exact).exp(),
        zero.index_add(0, paths.owner, goes_on).exp(),
    )


def factor_identity(calibrator: _Model) -> str:
    """Digest of the clean model, of a sample of each tensor, for the key of the disk cache."""
    digest = hashlib.sha256(f"{_WORK} {_MOST_ROWS} {_UNIGRAM_ROWS}".encode())
    for name, tensor in sorted(calibrator.clean.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _range_mass(laws: Tensor, row: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Mass from ``start`` up to ``stop`` in given rows of laws that are in byte order."""
    mass = laws.cumsum(-1, dtype=torch.float64)
    below = torch.where(start > 0, mass[row, (start - 1).clamp_min(0)], 0.0)
    return (mass[row, stop - 1] - below).clamp_min(1e-30).float()


def _next_laws(calibrator: _Model, tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Batches of next-token laws ``(rows, V_C)`` after BOS and each token, or after BOS alone."""
    model = calibrator.clean
    device = next(model.parameters()).device
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    rows = torch.full((max(len(tokens), 1), 1), calibrator.bos_id)
    if len(tokens):
        rows = torch.cat([rows, tokens[:, None]], dim=1)
    for begin in range(0, len(rows), _BATCH):
        batch = rows[begin : begin + _BATCH].to(device)
        logits = model(input_ids=batch, **options).logits[:, -1, : calibrator.vocabulary_size]
        yield slice(begin, begin + _BATCH), logits.float().softmax(-1).cpu()
