"""Static factors: the probability of a long target token given its first calibrator token."""

from __future__ import annotations

import hashlib
import inspect
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.vocabulary.token_table import TokenTable

_UNIGRAM_ROWS = 256
_MAX_ROWS = 2048
_BATCH = 128
# Multiply-adds spent on pairs of tokens: well below one second of one CPU core.
_WORK = 10_000_000_000


class CalibratorLike(Protocol):
    """The attributes of a calibrator that this package reads."""

    clean: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: TokenTable
    vocabulary_size: int
    bos_id: int


def from_array(values: array[Any]) -> Tensor:
    """A tensor of an array's values, much faster than ``torch.tensor`` for long arrays."""
    dtype = {"i": torch.int32, "q": torch.int64, "f": torch.float32}[values.typecode]
    return torch.frombuffer(values, dtype=dtype).clone() if values else torch.empty(0, dtype=dtype)


@torch.no_grad()
def static_factors(
    calibrator: CalibratorLike,
    paths: Sequence[tuple[int, ...]],
    subtrees: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Probability of each path's tokens after its first, whatever text precedes the path.

    It is a product over adjacent pairs of tokens. For the most important pairs, a token's
    probability comes from the clean model's distribution after BOS and the previous token; for all
    others, from the model's average distribution. The same factor is used for the clean and the
    reference distribution, so most of its error cancels in their difference.

    Args:
        calibrator: Its ``clean`` model is run on a few thousand rows of two tokens.
        paths: The calibrator tokens of each long target token, at least two.
        subtrees: Ids in byte order; and for each id, the start and stop in that order of the tokens
            that begin with its bytes.

    Returns:
        Two tensors ``(paths,)``: the probability of exactly these tokens, and the probability that
        the text continues with their bytes, where the last token counts as any token that begins
        with it.
    """
    zeros = torch.zeros(len(paths), dtype=torch.float32)
    if not paths:
        return zeros, zeros
    order, start, stop = subtrees
    heads, owner, previous, following, last = _adjacent_pairs(paths)
    ((_, opening),) = _next_distributions(calibrator, torch.tensor([], dtype=torch.long))
    common = opening[0].topk(min(_UNIGRAM_ROWS, opening.shape[-1]))
    average = torch.zeros_like(opening[0])
    for at, distributions in _next_distributions(calibrator, common.indices):
        average += common.values[at] @ distributions
    average = average / average.sum()

    exact = average[following].log()
    only_row = torch.zeros_like(following)
    bounds = start[following], stop[following]
    continued = _log_range_mass(average[None, order], only_row, *bounds)
    weight = average[heads].log().index_add(0, owner, exact).exp()
    importance = torch.zeros_like(average).index_add_(0, previous, weight[owner])
    size = sum(parameter.numel() for parameter in calibrator.clean.parameters())
    limit = min(max(_WORK // (2 * size + 1), _UNIGRAM_ROWS), _MAX_ROWS)
    limit = min(limit, int((importance > 0).sum()))
    chosen = importance.topk(limit).indices.sort().values

    # Sort pairs by their first token, so that each batch of rows serves one slice of them.
    pairs = torch.argsort(previous)
    sorted_previous = previous[pairs].contiguous()
    for at, distributions in _next_distributions(calibrator, chosen):
        low = torch.searchsorted(sorted_previous, chosen[at])
        count = torch.searchsorted(sorted_previous, chosen[at], right=True) - low
        row = torch.repeat_interleave(torch.arange(len(count)), count)
        offset = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        owned = pairs[low[row] + offset]
        end = following[owned]
        exact[owned] = distributions[row, end].log()
        continued[owned] = _log_range_mass(distributions[:, order], row, start[end], stop[end])
    continued = torch.where(last, continued, exact)
    return zeros.index_add(0, owner, exact).exp(), zeros.index_add(0, owner, continued).exp()


def model_digest(calibrator: CalibratorLike) -> str:
    """Digest of a sample of each tensor of the clean model, for the key of the disk cache."""
    digest = hashlib.sha256(f"{_WORK} {_MAX_ROWS} {_UNIGRAM_ROWS}".encode())
    for name, tensor in sorted(calibrator.clean.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _adjacent_pairs(paths: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """The first token of each path ``(paths,)``, and all adjacent pairs of tokens ``(pairs,)``.

    For each pair: its path, its two tokens, and whether it ends the path.
    """
    tokens = from_array(array("q", chain.from_iterable(paths)))
    lengths = from_array(array("q", map(len, paths)))
    path_of = torch.repeat_interleave(torch.arange(len(paths)), lengths)
    inside = path_of[1:] == path_of[:-1]
    ends = torch.ones(len(tokens), dtype=torch.bool)
    ends[:-1] = ~inside
    heads = tokens[lengths.cumsum(0) - lengths]
    return heads, path_of[1:][inside], tokens[:-1][inside], tokens[1:][inside], ends[1:][inside]


def _log_range_mass(probs: Tensor, row: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Log of the mass in ``[start, stop)`` of given rows of distributions in byte order."""
    mass = torch.nn.functional.pad(probs.cumsum(-1, dtype=torch.float64), (1, 0))
    return (mass[row, stop] - mass[row, start]).clamp_min(1e-30).log().float()


def _next_distributions(
    calibrator: CalibratorLike, tokens: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Batches of distributions ``(rows, V_C)`` after BOS and each token, or after BOS alone."""
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
