"""The fusion rules: pure functions of log-probs. No state, no models, no tokenizers.

Every rule moves probability only among the tokens that it *judges*: those that the vocabulary map
reaches and that are plausible under the target. The judged tokens keep their mass as a group, and
all others keep their probability, so that end-of-text neither swells nor vanishes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fusion_detox.config import FusionConfig

_LARGEST = 104.0
_SATURATED = 1 - 1e-6
"""Largest share of a soft cap that is inverted: beyond it float32 no longer tells logits apart."""


@dataclasses.dataclass(frozen=True)
class Fusion:
    """One step of fusion, prepared: which tokens are judged, and how far each moves.

    Attributes:
        scores: ``(batch, vocab)`` logits or log-probs of the target.
        log_probs: The same, normalised, in float32.
        judged: ``(batch, vocab)`` bool, the tokens that may move.
        dropped: ``(batch, vocab)`` bool, the tokens that lose all they have, if any.
        shift: By how much log-probs move at a strength, in nats and up to a constant a row; its
            second argument takes the columns that are wanted from a ``(batch, vocab)`` tensor.
        config: The rule and its settings.
        share: ``(batch,)`` of the strength that each row gets, 0 to 1; ``None`` for all of it.
    """

    scores: Tensor
    log_probs: Tensor
    judged: Tensor
    dropped: Tensor | None
    shift: Callable[[Tensor | float, Callable[[Tensor], Tensor]], Tensor]
    config: FusionConfig
    share: Tensor | None = None

    def strength(self) -> Tensor:
        """``(batch,)``: that of the settings, or less where a budget or the context lowers it.

        0 for rows with NaN, which come back as they were.
        """
        strength = torch.where(_broken(self.log_probs), 0.0, self._within_budget()[0])
        return strength.squeeze(-1).to(self.log_probs.dtype)

    def fused(self) -> Tensor:
        """``(batch, vocab)`` normalised log-probs in the dtype of the scores."""
        strength, dropped = self._within_budget()
        log_probs, judged = self.log_probs, self.judged
        moved = _move(log_probs, self.shift(strength, _all_columns), judged, dropped)
        moved = torch.where(judged.any(-1, keepdim=True), moved, log_probs)
        scores = self.scores
        return torch.where(_broken(log_probs), scores.float(), moved).to(scores.dtype)

    def _within_budget(self) -> tuple[Tensor | float, Tensor | None]:
        """``(batch, 1)``, the largest strength that keeps to the KL budget, and what is dropped.

        ``KL(f_a || p)`` grows with ``a`` for all rules but a soft-capped head's, where bisection
        still ends within the budget. Only judged tokens move. Where dropping the others would
        alone exceed the budget, they stay.
        """
        config, judged, dropped = self.config, self.judged, self.dropped
        most: Tensor | float = config.strength
        if self.share is not None:
            most = config.strength * self.share[:, None]
        count = int(judged.sum(-1).max())
        if config.kl_budget is None or count == 0:
            return most, dropped
        logs, index = self.log_probs.masked_fill(~judged, -math.inf).topk(count, dim=-1)
        there = torch.isfinite(logs)
        own = torch.logsumexp(logs, -1, keepdim=True).exp()
        group = own
        if dropped is not None:
            group = own + self.log_probs.exp().masked_fill(~dropped, 0.0).sum(-1, keepdim=True)
            bearable = group * torch.log(group / own.clamp_min(1e-30)) <= config.kl_budget
            dropped, group = dropped & bearable, torch.where(bearable, group, own)

        def divergence(strength: Tensor) -> Tensor:
            steps = self.shift(strength, lambda values: values.gather(-1, index))
            tilted = (logs + steps).masked_fill(~there, -math.inf)
            total = torch.logsumexp(tilted, -1, keepdim=True)
            law = (tilted - total).exp().nan_to_num(nan=0.0)
            mean = torch.where(law > 0, law * steps, 0.0).sum(-1, keepdim=True)
            return (group * (mean - total + group.clamp_min(1e-30).log())).nan_to_num(nan=0.0)

        low = torch.zeros_like(own)
        high = most = torch.zeros_like(own) + most
        within = divergence(high) <= config.kl_budget
        for _ in range(14):
            middle = (low + high) / 2
            fits = divergence(middle) <= config.kl_budget
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(within, most, low), dropped


def fuse(
    scores: Tensor,
    clean: Tensor,
    reference: Tensor | None,
    mapped: Tensor,
    config: FusionConfig,
    share: Tensor | None = None,
) -> Tensor:
    """Fuses the calibrator's distributions into the target's scores.

    Args:
        scores: ``(batch, vocab)`` logits or log-probs of the target; ``-inf`` forbids a token.
        clean: ``(batch, vocab)`` probabilities of the clean model in the target's vocabulary.
        reference: Likewise, of the reference; only the contrast rules read it.
        mapped: ``(vocab,)`` which tokens the calibrator can judge.
        config: The rule and its settings; its ``context_kl`` is not read.
        share: ``(batch,)`` of the strength that each row gets, 0 to 1; all of it by default.

    Returns:
        ``(batch, vocab)`` normalised log-probs in the dtype of ``scores``; ``scores`` itself at
        strength 0. Where an input is ``-inf`` the output is too; rows with NaN come back as they
        were.
    """
    if config.strength == 0:
        return scores
    return prepare(scores, clean, reference, mapped, config, share).fused()


def strength_used(
    scores: Tensor, clean: Tensor, reference: Tensor | None, mapped: Tensor, config: FusionConfig
) -> Tensor:
    """The strength that :func:`fuse` applies to each row, of the same arguments.

    Returns:
        ``(batch,)`` in float32: ``config.strength``, or less where ``kl_budget`` lowers it; 0 for
        rows with NaN, which come back as they were.
    """
    return prepare(scores, clean, reference, mapped, config).strength()


def prepare(
    scores: Tensor,
    clean: Tensor,
    reference: Tensor | None,
    mapped: Tensor,
    config: FusionConfig,
    share: Tensor | None = None,
) -> Fusion:
    """A step by the rules that work on distributions; arguments as in :func:`fuse`."""
    log_probs, judged, dropped = _judge(scores, mapped, config)
    if config.contrasts:
        assert reference is not None
        difference = log_ratio(clean, reference, config).masked_fill(~judged, 0.0)
        return Fusion(scores, log_probs, judged, dropped, _times(difference), config, share)
    if config.rule == "product":
        difference = torch.log(clean + config.floor) - log_probs
        return Fusion(scores, log_probs, judged, dropped, _times(difference), config, share)
    inside = log_probs.masked_fill(~judged, -math.inf)
    inside = inside - torch.logsumexp(inside, dim=-1, keepdim=True)
    own = clean.masked_fill(~judged, 0.0)
    own = own / own.sum(-1, keepdim=True).clamp_min(1e-30)

    def mix(strength: Tensor | float, columns: Callable[[Tensor], Tensor]) -> Tensor:
        law = columns(inside)
        return torch.log((1 - strength) * law.exp() + strength * columns(own)) - law

    return Fusion(scores, log_probs, judged, dropped, mix, config, share)


def prepare_aligned(
    scores: Tensor,
    carried: Tensor,
    known: Tensor,
    cap: float | None,
    config: FusionConfig,
    share: Tensor | None = None,
) -> Fusion:
    """A step by the aligned rule: fusion of last hidden states, on logits (arXiv 2506.01266).

    The target's head is affine, ``W h + b``, and the weights of the fusion add up to 1, so that
    ``W (a u + (1 - a) h) + b = a (W u + b) + (1 - a) (W h + b)``. A soft cap behind it,
    ``c tanh(x / c)``, is taken off the scores and put on again.

    Args:
        scores: ``(batch, vocab)`` logits of the target; where the head has no cap also log-probs.
        carried: ``(batch, vocab)`` what the head makes of the calibrator's vectors ``u``, in the
            target's space; without the soft cap.
        known: ``(vocab,)`` which columns the head has.
        cap: The head's soft cap, if any.
        config: The settings.
        share: As in :func:`fuse`.
    """
    log_probs, judged, dropped = _judge(scores, known, config)
    if cap is None:
        difference = carried - log_probs
        return Fusion(scores, log_probs, judged, dropped, _times(difference), config, share)
    bounded = (scores.float() / cap).clamp(-_SATURATED, _SATURATED)
    raw = cap * torch.atanh(bounded)
    # What no cap explains (of a processor before this one) stays beside it.
    rest = scores.float() - cap * bounded

    def blend(strength: Tensor | float, columns: Callable[[Tensor], Tensor]) -> Tensor:
        mixed = (1 - strength) * columns(raw) + strength * columns(carried)
        return cap * torch.tanh(mixed / cap) + (1 - strength) * columns(rest) - columns(log_probs)

    return Fusion(scores, log_probs, judged, dropped, blend, config, share)


def _judge(
    scores: Tensor, mapped: Tensor, config: FusionConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs, the tokens that are judged, and those that are dropped."""
    log_probs = torch.log_softmax(scores.float(), dim=-1)
    judged = mapped & _plausible(log_probs, config.plausibility)
    return log_probs, judged, mapped & ~judged if config.outside == "remove" else None


def _times(difference: Tensor) -> Callable[[Tensor | float, Callable[[Tensor], Tensor]], Tensor]:
    return lambda strength, columns: strength * columns(difference)


def _all_columns(values: Tensor) -> Tensor:
    return values


def _broken(log_probs: Tensor) -> Tensor:
    """``(batch, 1)``, rows with NaN; also where a score is +inf or all are -inf."""
    return torch.isnan(log_probs).any(-1, keepdim=True)


def log_ratio(clean: Tensor, reference: Tensor, config: FusionConfig) -> Tensor:
    """What non-toxic training changed: ``log q_clean - log q_reference``, bounded, noise removed.

    Args:
        clean: Probabilities, any shape.
        reference: Probabilities, the same shape.
        config: Its ``floor``, ``threshold`` and ``clip`` are read.

    Returns:
        Nats, within ``clip`` on both sides; negative where the clean model holds back.
    """
    ratio = torch.log((clean + config.floor) / (reference + config.floor))
    if not config.floor:  # 0 / 0 says nothing, and no finite ratio of float32 is beyond 1e45
        ratio = ratio.nan_to_num(nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    if config.threshold:
        ratio = torch.nn.functional.softshrink(ratio, config.threshold)
    return ratio.clamp(-config.clip, config.clip)


def kl_divergence(law: Tensor, base: Tensor) -> Tensor:
    """``KL(law ‖ base)`` in nats, ``(batch,)``, of two ``(batch, vocab)`` tensors of log-probs."""
    probs = law.exp()
    return torch.where(probs > 0, probs * (law - base), 0.0).sum(-1)


def _plausible(log_probs: Tensor, fraction: float) -> Tensor:
    allowed = log_probs > -math.inf
    if fraction == 0:
        return allowed
    best = log_probs.amax(-1, keepdim=True)
    return allowed & (log_probs >= best + math.log(fraction))


def _move(log_probs: Tensor, shift: Tensor, judged: Tensor, dropped: Tensor | None) -> Tensor:
    """Adds ``shift`` to the judged tokens and gives the group the mass that it had.

    The mass of ``dropped`` tokens goes to the group too. A group of which nothing would be left is
    left as it is.
    """
    group = judged if dropped is None else judged | dropped
    mass = torch.logsumexp(log_probs.masked_fill(~group, -math.inf), -1, keepdim=True)
    shifted = (log_probs + shift).masked_fill(~judged, -math.inf)
    total = torch.logsumexp(shifted, -1, keepdim=True)
    return torch.where(group & ~torch.isneginf(total), shifted + (mass - total), log_probs)
