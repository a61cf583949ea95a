"""Explains fusion: the tokens that it made more and less likely at each step of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fusion_detox.errors import DataError
from fusion_detox.fusion import kl_divergence
from fusion_detox.generation import HELD_BACK_NATS

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel


class TokenChange(NamedTuple):
    """The change of one token's log-prob at one step, in nats.

    Under the contrast rule, ``change`` is the strength times the calibrator's log-ratio of clean to
    reference, minus a normaliser that all tokens of the step share.
    """

    token_id: int
    target_log_prob: float
    fused_log_prob: float

    @property
    def change(self) -> float:
        """Change of the log-prob: above 0 if fusion raised the token, below 0 if it lowered it."""
        if self.target_log_prob == self.fused_log_prob:
            return 0.0
        return self.fused_log_prob - self.target_log_prob

    @property
    def moved(self) -> float:
        """Change of the probability: above 0 if fusion raised the token, below 0 otherwise."""
        return math.exp(self.fused_log_prob) - math.exp(self.target_log_prob)


class Step(NamedTuple):
    """What fusion did at one step of a text.

    Attributes:
        written: The change of the token that the text contains.
        lowered: The tokens that lost the most probability, the largest loss first.
        raised: The tokens that gained the most probability, the largest gain first.
        kl: KL(fused ‖ target), in nats.
        before: The tokens that were most probable before fusion, the most probable first.
        after: The tokens that are most probable after fusion, the most probable first.
    """

    written: TokenChange
    lowered: tuple[TokenChange, ...]
    raised: tuple[TokenChange, ...]
    kl: float
    before: tuple[TokenChange, ...] = ()
    after: tuple[TokenChange, ...] = ()

    def held_back(self, nats: float = HELD_BACK_NATS) -> bool:
        """Return whether fusion made the written token at least ``exp(nats)`` times less likely."""
        return self.written.change <= -nats


def explain_steps(
    target_logits: Tensor, fused_log_probs: Tensor, token_ids: Sequence[int], *, top: int = 3
) -> list[Step]:
    """Compare the distributions before and after fusion at each step of a text.

    Args:
        target_logits: ``(steps, vocab)``, the target's logits or log-probs.
        fused_log_probs: ``(steps, vocab)``, the processor's output for them.
        token_ids: The text's token at each step.
        top: Maximum number of tokens in each list of a step.

    Raises:
        DataError: The numbers of steps or the vocabularies differ.
    """
    if target_logits.shape != fused_log_probs.shape or len(target_logits) != len(token_ids):
        raise DataError(
            f"{len(token_ids)} tokens need one row each of target and fused scores, but their "
            f"shapes are {tuple(target_logits.shape)} and {tuple(fused_log_probs.shape)}: pass "
            "scores of the same steps and vocabulary"
        )
    before = torch.log_softmax(target_logits.float(), dim=-1)
    after = torch.log_softmax(fused_log_probs.float(), dim=-1)
    moved = after.exp() - before.exp()
    kl = kl_divergence(after, before)
    top = min(top, moved.shape[-1])
    down = (-moved).topk(top, dim=-1).indices.tolist()
    up = moved.topk(top, dim=-1).indices.tolist()
    first = before.topk(top, dim=-1).indices.tolist()
    then = after.topk(top, dim=-1).indices.tolist()

    def change(step: int, token: int) -> TokenChange:
        return TokenChange(token, before[step, token].item(), after[step, token].item())

    return [
        Step(
            written=change(step, token),
            lowered=tuple(change(step, t) for t in down[step] if moved[step, t] < 0),
            raised=tuple(change(step, t) for t in up[step] if moved[step, t] > 0),
            kl=max(kl[step].item(), 0.0),
            before=tuple(change(step, t) for t in first[step]),
            after=tuple(change(step, t) for t in then[step]),
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
    """Run the target over a continuation, and explain what fusion does at each step.

    Args:
        model: The target.
        processor: A ``FusionLogitsProcessor`` for the target's tokenizer.
        prompt_ids: The tokens before the continuation, at least one. ``prompt_ids`` of
            ``generation.sampling`` gives those of a text or, for a job with ``chat``, of a request
            in the chat template.
        continuation_ids: The tokens to explain.
        top: See :func:`explain_steps`.

    Raises:
        DataError: ``prompt_ids`` is empty.
    """
    if not prompt_ids:
        raise DataError("prompt_ids is empty: give at least one token, such as the BOS token")
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
