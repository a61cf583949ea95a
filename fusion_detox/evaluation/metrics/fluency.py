"""Perplexity of continuations given their prompts, under any causal language model.

Prompt and continuation are tokenised *together*, as in the model's training. Tokenising the
continuation separately would penalise it for a tokenisation that the model never sees. A token
counts if it holds at least one character of the continuation. If the prompt ends inside a word, the
token that straddles the border counts in full. All generated text is therefore scored, along with
the prompt's last letters. Tokens entirely inside the prompt are context only.

No continuation is left out for being improbable. The evaluation scripts of DExperts (Liu et al.
2021) leave out continuations with a perplexity of 10,000 or more, which favours methods that
produce broken text. Continuations that cannot be scored are counted, with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusion_detox.config import check_number
from fusion_detox.errors import DataError
from fusion_detox.evaluation.metrics.statistics import (
    Floats,
    Interval,
    Resamples,
    exp_ratio_interval,
    finite,
    interval,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMPTY, NO_CONTEXT = "empty continuation", "no token before the first one"
TOO_LONG, NOT_TEXT = "longer than the model's context", "not valid Unicode text"
NOT_FINITE = "the model's log-prob is not finite"
_MAX_LOGITS = 1 << 28  # per batch: 1 GiB in float32


class Nll(NamedTuple):
    """Negative log-likelihood of one continuation.

    Attributes:
        nats: Sum over the tokens; nan if the continuation was not scored.
        tokens: Number of tokens that count, in the scoring model's tokenisation.
        bytes: Length of the continuation in UTF-8; 0 if only ids were given.
        cut: Tokens cut off the start of the prompt because they did not fit.
        why: The reason that the continuation was not scored; empty if it was.
    """

    nats: float
    tokens: int
    bytes: int
    cut: int = 0
    why: str = ""


class _Text(NamedTuple):
    """Token ids. Those from ``first`` on are scored; the first ``fixed`` are never cut off."""

    ids: list[int]
    first: int
    fixed: int


def continuation_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    continuations: Sequence[str],
    batch_size: int = 32,
) -> list[Nll]:
    """Scores continuations by text, with any model and its tokenizer.

    The tokenizer's character offsets give the border. Without offsets (a slow tokenizer), tokens
    count from the first one that differs from the tokenisation of the prompt alone.
    Special tokens before the text are kept and those after it are removed. If no token precedes the
    first counted one, as after an empty prompt, the BOS token is prepended.

    Args:
        model: The scoring model.
        tokenizer: The scoring model's tokenizer.
        prompts: One prompt per continuation.
        continuations: The continuations, with their leading space if any.
        batch_size: Maximum texts per batch; fewer if their logits would exceed 1 GiB.

    Returns:
        One result per continuation, in order.

    Raises:
        DataError: The numbers of prompts and continuations differ.
        ConfigError: ``batch_size`` is below 1.
    """
    _check_lengths(prompts, continuations)
    rows: list[_Text | str] = [
        _tokenise(tokenizer, prompt, text)
        for prompt, text in zip(prompts, continuations, strict=True)
    ]
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in continuations]
    return _score(model, rows, sizes, batch_size)


def continuation_nll_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int = 32,
    texts: Sequence[str] | None = None,
) -> list[Nll]:
    """Scores continuations by their sampled token ids, with the target itself.

    Args:
        model: The target.
        prompts: Token ids of each prompt, with the BOS token if the target has one.
        continuations: Token ids of each continuation.
        batch_size: See :func:`continuation_nll`.
        texts: The continuations as text, for ``bytes``.

    Returns:
        One result per continuation, in order.

    Raises:
        DataError: The lengths differ.
        ConfigError: ``batch_size`` is below 1.
    """
    _check_lengths(prompts, continuations)
    if texts is not None:
        _check_lengths(texts, continuations)
    rows: list[_Text | str] = []
    for before, new in zip(prompts, continuations, strict=True):
        if not new:
            rows.append(EMPTY)
        elif not before:
            rows.append(NO_CONTEXT)
        else:
            rows.append(_Text([*before, *new], len(before), 0))
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in texts or [""] * len(rows)]
    return _score(model, rows, sizes, batch_size)


def perplexity(
    found: Sequence[Sequence[Nll]], draws: Resamples, base: Sequence[Sequence[Nll]] | None = None
) -> dict[str, Any]:
    """Perplexity of a setting's continuations.

    Args:
        found: The samples of each prompt, over all seeds.
        draws: Resamples of the same number of prompts.
        base: The base's samples, for comparison.

    Returns:
        - ``token_weighted``: ``exp(nats / tokens)`` over all samples, with its interval.
        - ``median`` of the perplexities of the samples.
        - ``relative``: ``token_weighted`` divided by the base's, over prompts with a scored sample
          on both sides, with a paired interval; ``None`` without ``base``.
        - ``scored`` and ``not_scored``: numbers of samples; ``why`` gives the reasons.
        - ``cut``: the number of scored samples whose prompt was cut off on the left.

    Raises:
        DataError: The number of prompts differs from that of ``draws``.
    """
    samples = [nll for prompt in found for nll in prompt]
    scored = [nll for nll in samples if not nll.why]
    reasons = Counter(nll.why for nll in samples if nll.why)
    each = [_exp(nll.nats / nll.tokens) for nll in scored]
    sums = _sums(found)
    relative: Interval | None = None
    if base is not None:
        _check_lengths(base, found)
        relative = interval(np.concatenate([sums, _sums(base)], 1), _relative, draws)
    return {
        "token_weighted": exp_ratio_interval(sums[:, 0], sums[:, 1], draws),
        "median": finite(float(np.median(each))) if each else None,
        "relative": relative,
        "scored": len(scored),
        "not_scored": len(samples) - len(scored),
        "why": "; ".join(f"{why} ({count})" for why, count in sorted(reasons.items())),
        "cut": sum(nll.cut > 0 for nll in scored),
    }


def context_limit(model: PreTrainedModel) -> int | None:
    """The model's maximum number of positions, or ``None`` if its config names none."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def length_batches(
    lengths: Sequence[int], batch_size: int, vocabulary: int
) -> Iterator[tuple[int, ...]]:
    """Batches of indices of similar length, longest first, each with at most 1 GiB of logits.

    Args:
        lengths: Positions of each text.
        batch_size: Maximum texts per batch.
        vocabulary: Width of the logits.

    Raises:
        ConfigError: ``batch_size`` is below 1.
    """
    check_number("batch_size", batch_size, 1, whole=True)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        fitting = _MAX_LOGITS // max(lengths[order[start]] * vocabulary, 1)
        rows = max(1, min(batch_size, fitting))
        yield tuple(order[start : start + rows])
        start += rows


def without_closing(encoded: Any) -> tuple[list[int], list[int]]:
    """Token ids and special-token mask of an encoded text, without special tokens at its end."""
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while ids and special[-1]:
        ids.pop()
        special.pop()
    return ids, special


def pad_right(texts: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, ``(texts, longest)``, for causal attention."""
    import torch

    longest = max(map(len, texts))
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in texts]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts]
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def _tokenise(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> _Text | str:
    if not text:
        return EMPTY
    try:
        (prompt + text).encode()
    except UnicodeEncodeError:
        return NOT_TEXT
    encoded = tokenizer(
        prompt + text,
        return_special_tokens_mask=True,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids, special = without_closing(encoded)
    if not ids:
        return EMPTY
    fixed = next(k for k in range(len(ids)) if not special[k])
    if tokenizer.is_fast:
        ends = [end for _, end in encoded["offset_mapping"][: len(ids)]]
        later = (k for k in range(fixed, len(ids)) if ends[k] > len(prompt))
        first = next(later, len(ids))
    else:
        alone: list[int] = tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
        same = (k for k, (one, other) in enumerate(zip(ids, alone, strict=False)) if one != other)
        first = max(next(same, min(len(ids), len(alone))), fixed)
    if first == len(ids):
        return EMPTY
    if first == 0:
        if tokenizer.bos_token_id is None:
            return NO_CONTEXT
        ids, first, fixed = [int(tokenizer.bos_token_id), *ids], 1, 1
    return _Text(ids, first, fixed)


def _fit(row: _Text, limit: int | None) -> tuple[_Text, int] | str:
    """The text with its prompt cut on the left to fit the context, and the number of tokens cut.

    The last token is predicted but not read, so it needs no position.
    """
    excess = 0 if limit is None else max(0, len(row.ids) - 1 - limit)
    # At least one token must precede the first counted one.
    if excess > row.first - max(row.fixed, 1):
        return TOO_LONG
    ids = row.ids[: row.fixed] + row.ids[row.fixed + excess :]
    return _Text(ids, row.first - excess, row.fixed), excess


def _score(
    model: PreTrainedModel, rows: Sequence[_Text | str], sizes: Sequence[int], batch_size: int
) -> list[Nll]:
    limit = context_limit(model)
    fitted = [row if isinstance(row, str) else _fit(row, limit) for row in rows]
    result = [
        Nll(math.nan, 0, size, 0, row if isinstance(row, str) else "")
        for row, size in zip(fitted, sizes, strict=True)
    ]
    pending = [(index, *row) for index, row in enumerate(fitted) if not isinstance(row, str)]
    width = int(model.config.get_text_config().vocab_size)
    lengths = [len(text.ids) - 1 for _, text, _ in pending]
    for batch in length_batches(lengths, batch_size, width):
        nats = _batch_nats(model, [pending[k][1] for k in batch])
        for k, value in zip(batch, nats, strict=True):
            index, text, cut = pending[k]
            tokens = len(text.ids) - text.first
            known = math.isfinite(value)
            result[index] = Nll(
                value if known else math.nan,
                tokens if known else 0,
                sizes[index],
                cut,
                "" if known else NOT_FINITE,
            )
    return result


def _batch_nats(model: PreTrainedModel, texts: Sequence[_Text]) -> list[float]:
    import torch

    ids, mask = pad_right([text.ids[:-1] for text in texts], model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = []
        for row, text in enumerate(texts):
            end = len(text.ids)
            log_probs = logits[row, text.first - 1 : end - 1].float().log_softmax(-1)
            own = torch.tensor(text.ids[text.first :], device=logits.device)
            found.append(-float(log_probs.gather(1, own[:, None]).sum()))
    return found


def _sums(found: Sequence[Sequence[Nll]]) -> Floats:
    """Nats and tokens of each prompt's scored samples, ``(prompts, 2)``; nan if there are none."""
    table = np.full((len(found), 2), np.nan)
    for index, prompt in enumerate(found):
        scored = [nll for nll in prompt if not nll.why]
        if scored:
            table[index] = np.sum([(nll.nats, nll.tokens) for nll in scored], axis=0)
    return table


def _relative(sums: Floats) -> Floats:
    change: Floats = sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]
    return np.exp(change)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700.0 else math.inf


def _check_lengths(one: Sequence[Any], other: Sequence[Any]) -> None:
    if len(one) != len(other):
        raise DataError(
            f"lists of {len(one)} and {len(other)} entries do not match; give equally many"
        )
