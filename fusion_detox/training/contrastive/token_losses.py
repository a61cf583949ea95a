"""Per-row losses over large vocabularies: mean negative log-likelihood, and KL to a base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_detox.errors import DataError
from fusion_detox.training.loss import IGNORED


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the counted tokens of each row, in nats a token.

    This is the logarithm of a text's perplexity, equation 1 of arXiv 2401.08491. What is labelled
    ``IGNORED`` (padding, prompts, the leading BOS) takes no part, so a row's value does not depend
    on its neighbours. Only slices of the logits are ever held in float32 (float64 stays).

    Args:
        logits: ``(rows, length, vocab)``; position ``t`` predicts ``labels[:, t + 1]``.
        labels: ``(rows, length)`` token ids; ``IGNORED`` where a token does not count.

    Returns:
        ``(rows,)``, float32 or float64.

    Raises:
        DataError: A row has no counted token, so its mean does not exist.
    """
    rows, positions, targets, counts = _counted(labels)
    values: Tensor = _CountedNll.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, logits.shape[-1]), positions, targets
    )
    return values.new_zeros(len(labels)).index_add(0, rows, values) / counts


def kl_to_base(logits: Tensor, base_logits: Tensor, labels: Tensor) -> Tensor:
    """KL(model ‖ base) of the next-token distributions, mean over each row's counted tokens.

    The direction is that in which ``evaluate`` states what fusion changes on harmless text.

    Args:
        logits: ``(rows, length, vocab)`` of the model in training.
        base_logits: The same shape, of the frozen base model; it gets no gradient.
        labels: ``(rows, length)``; the distributions before a token labelled ``IGNORED`` do not
            count.

    Returns:
        ``(rows,)`` in nats a token, float32 or float64.

    Raises:
        DataError: A row has no counted token.
    """
    rows, positions, _, counts = _counted(labels)
    width = logits.shape[-1]
    values: Tensor = _CountedKl.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, width), base_logits.detach().reshape(-1, width), positions
    )
    return values.new_zeros(len(labels)).index_add(0, rows, values) / counts


def _counted(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each counted token its row, the flat position before it and its id; then rows' counts."""
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    counted = following != IGNORED
    counts = counted.sum(1)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"row {empty[0]} of {len(labels)} has no counted token, so it has no perplexity: its "
            "text is empty, or nothing of it is left after the prompt and the cut to the context"
        )
    positions = counted.flatten().nonzero().flatten()
    rows = positions.div(labels.shape[1], rounding_mode="floor")
    return rows, positions, following.flatten()[positions], counts


def _slices(positions: Tensor) -> list[Tensor]:
    """Small enough for a CPU's cache, large enough for a GPU's launches."""
    size = 16 if positions.device.type == "cpu" else 1024
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def _wide(part: Tensor) -> Tensor:
    return part if part.dtype == torch.float64 else part.float()


def _empty_values(logits: Tensor, positions: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty(len(positions), dtype=dtype, device=logits.device)


class _CountedNll(torch.autograd.Function):
    """Negative log-likelihood at some positions; the softmax is made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        values, normalisers = (
            _empty_values(logits, positions),
            _empty_values(logits, positions),
        )
        done = 0
        for part in _slices(positions):
            rows = _wide(logits[part])
            span = slice(done, done + len(part))
            normalisers[span] = torch.logsumexp(rows, dim=-1)
            values[span] = normalisers[span] - rows.gather(1, targets[span, None]).squeeze(1)
            done += len(part)
        ctx.save_for_backward(logits, positions, targets, normalisers)
        return values

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, positions, targets, normalisers = ctx.saved_tensors
        gradient, done = torch.zeros_like(logits), 0
        for part in _slices(positions):
            span = slice(done, done + len(part))
            probs = _wide(logits[part]).sub_(normalisers[span, None]).exp_()
            probs.scatter_add_(1, targets[span, None], probs.new_full((len(part), 1), -1.0))
            probs *= output_gradients[0][span, None]
            gradient[part] = probs.to(gradient.dtype)
            done += len(part)
        return gradient, None, None


class _CountedKl(torch.autograd.Function):
    """KL(model ‖ base) at some positions, by the same economy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, base: Tensor, positions: Tensor) -> Tensor:
        values, done = _empty_values(logits, positions), 0
        for part in _slices(positions):
            log_probs, gap = _log_ratio(logits, base, part)
            values[done : done + len(part)] = (log_probs.exp() * gap).sum(-1)
            done += len(part)
        ctx.save_for_backward(logits, base, positions, values)
        return values

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, base, positions, values = ctx.saved_tensors
        gradient, done = torch.zeros_like(logits), 0
        for part in _slices(positions):
            span = slice(done, done + len(part))
            log_probs, gap = _log_ratio(logits, base, part)
            # d KL / d z_i = p_i (log p_i - log b_i - KL)
            change = log_probs.exp() * (gap - values[span, None]) * output_gradients[0][span, None]
            gradient[part] = change.to(gradient.dtype)
            done += len(part)
        return gradient, None, None


def _log_ratio(logits: Tensor, base: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs, and their difference from the base's; 0 where a token is impossible in both."""
    log_probs = torch.log_softmax(_wide(logits[part]), dim=-1)
    gap = log_probs - torch.log_softmax(_wide(base[part]).to(log_probs.dtype), dim=-1)
    return log_probs, gap.masked_fill(log_probs == float("-inf"), 0.0)
