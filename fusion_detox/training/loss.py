"""Cross-entropy over large vocabularies, and bits per byte."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of positions that do not count: padding, prompts, and the first token of a row."""


class _TokenCrossEntropy(torch.autograd.Function):
    """Summed next-token loss that converts only one slice of the logits to float32 at a time.

    The textbook version converts all of ``(tokens, vocab)`` to float32 several times, which costs
    more than a small model itself on a CPU. Here each slice is visited once, and its gradient is
    stored in the dtype of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, slice_rows: int) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for start in range(0, logits.shape[0], slice_rows):
            rows = slice(start, start + slice_rows)
            counted = labels[rows] != IGNORED
            target = labels[rows].clamp_min(0).unsqueeze(1)
            log_probs = torch.log_softmax(logits[rows].float(), dim=-1)
            total += -(log_probs.gather(1, target).squeeze(1) * counted).sum()
            if gradient is not None:
                probs = log_probs.exp_()
                probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
                gradient[rows] = (probs * counted.unsqueeze(1)).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(output_gradients[0].to(gradient.dtype)), None, None


def summed_cross_entropy(logits: Tensor, labels: Tensor, *, slice_rows: int = 16) -> Tensor:
    """Sum the negative log-likelihoods of ``labels``, in nats.

    Args:
        logits: ``(batch, length, vocab)``; position ``t`` predicts ``labels[:, t + 1]``.
        labels: ``(batch, length)`` token ids; ``IGNORED`` for tokens that do not count.
        slice_rows: Positions to convert to float32 at a time.

    Returns:
        A float32 scalar.
    """
    # Shifting the labels instead of the logits avoids a copy of the largest tensor.
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    total: Tensor = _TokenCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, logits.shape[-1]), following.reshape(-1), slice_rows
    )
    return total


def bits_per_byte(summed_nats: float, text_bytes: int) -> float:
    """Convert a summed loss to bits per byte, which are comparable across vocabularies.

    Args:
        summed_nats: Sum of the negative log-likelihoods, in nats.
        text_bytes: Bytes of the text.
    """
    return summed_nats / math.log(2) / max(text_bytes, 1)
