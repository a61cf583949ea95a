"""Which tokens fusion held back in a text, step by step, and what it put in their place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fusion_detox.errors import DataError
from fusion_detox.fusion import kl_divergence

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel


class TokenChange(NamedTuple):
    """What fusion did to one token at one step; log-probs in nats.

    For the contrast rule ``change`` is the strength times the calibrator's log-ratio of clean to
    reference, less a normaliser that all tokens of the step share.
    """

    token_id: int
    target_log_prob: float
    fused_log_prob: float

    @property
    def change(self) -> float:
        """Nats by which the token became more likely (above 0) or less (below 0)."""
        if self.target_log_prob == self.fused_log_prob:
            return 0.0
        return self.fused_log_prob - self.target_log_prob

    @property
    def moved(self) -> float:
        """Probability that the token gained (above 0) or lost (below 0)."""
        return math.exp(self.fused_log_prob) - math.exp(self.target_log_prob)


class Step(NamedTuple):
    """One step of a text.

    Attributes:
        written: The token that the text has here.
        lowered: The tokens that lost most probability, the largest loss first.
        raised: The tokens that gained most, the largest gain first.
        kl: KL(fused ‖ target) of the step, in nats.
    """

    written: TokenChange
    lowered: tuple[TokenChange, ...]
    raised: tuple[TokenChange, ...]
    kl: float

    def held_back(self, nats: float = 1.0) -> bool:
        """Whether fusion made the written token at least ``exp(nats)`` times less likely."""
        return self.written.change <= -nats


def explain_steps(
    target_logits: Tensor, fused_log_probs: Tensor, token_ids: Sequence[int], *, top: int = 3
) -> list[Step]:
    """Compares both distributions over a text.

    Args:
        target_logits: ``(steps, vocab)``, with any constant offset.
        fused_log_probs: ``(steps, vocab)``, what the processor made of them.
        token_ids: The token that the text has at each step.
        top: Number of lowered and of raised tokens to name a step.

    Raises:
        DataError: The shapes do not fit together.
    """
    if target_logits.shape != fused_log_probs.shape or len(target_logits) != len(token_ids):
        raise DataError(
            f"{len(token_ids)} tokens need as many rows of scores, but the target's are "
            f"{tuple(target_logits.shape)} and the fused {tuple(fused_log_probs.shape)}"
        )
    before = torch.log_softmax(target_logits.float(), dim=-1)
    after = torch.log_softmax(fused_log_probs.float(), dim=-1)
    moved = after.exp() - before.exp()
    kl = kl_divergence(after, before)
    top = min(top, moved.shape[-1])
    down = (-moved).topk(top, dim=-1).indices.tolist()
    up = moved.topk(top, dim=-1).indices.tolist()

    def change(step: int, token: int) -> TokenChange:
        return TokenChange(token, before[step, token].item(), after[step, token].item())

    return [
        Step(
            written=change(step, token),
            lowered=tuple(change(step, t) for t in down[step] if moved[step, t] < 0),
            raised=tuple(change(step, t) for t in up[step] if moved[step, t] > 0),
            kl=max(kl[step].item(), 0.0),
        )
        for step, token in enumerate(token_ids)
    ]


def explain(
    model: PreTrainedModel,
    processor: LogitsProcessor,
    prompt_ids: Sequence[int],
    continuation_ids: Sequence[int],
    *,
    top: int = 3,
) -> list[Step]:
    """Reads a continuation with the target and tells what fusion would have done at each step.

    Args:
        model: The target.
        processor: A ``FusionLogitsProcessor`` for the target's tokenizer.
        prompt_ids: Tokens before the continuation, at least one.
        continuation_ids: The tokens to explain.
        top: See :func:`explain_steps`.

    Raises:
        DataError: There is no token to condition the first step on.
    """
    if not prompt_ids:
        raise DataError("a text to explain needs at least one token before it, such as the BOS")
    if not continuation_ids:
        return []
    ids = torch.tensor([[*prompt_ids, *continuation_ids]], device=model.device)
    first = len(prompt_ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, first - 1 : -1].float()
        fused = [
            processor(ids[:, : first + step], logits[step : step + 1])
            for step in range(len(continuation_ids))
        ]
    return explain_steps(logits, torch.cat(fused), continuation_ids, top=top)
