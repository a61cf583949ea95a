"""The fusion rules: pure functions of log-probs. No state, no models, no tokenizers.

Every rule moves probability only among the *candidates*: the tokens that the vocabulary map reaches
and that are plausible under the target. Candidates keep their mass as a group and all other tokens
keep their probability, so end-of-text becomes neither more nor less likely.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fusion_detox.config import FusionConfig
from fusion_detox.errors import DataError

Columns = Callable[[Tensor], Tensor]
"""Selects the needed columns of a ``(batch, vocab)`` tensor."""

_MAX_LOG = 104.0
"""In nats: no finite ratio of two float32 numbers is larger than e to this power."""
_MAX_SHIFT = 1e30
"""In nats: sums of it stay finite in float32."""
_SATURATED = 1 - 1e-6
"""Scores up to this fraction of a soft cap are inverted; float32 cannot separate higher ones."""


@dataclasses.dataclass(frozen=True)
class Fusion:
    """One prepared fusion step: which tokens may move, and how far each moves.

    Attributes:
        scores: ``(batch, vocab)`` logits or log-probs of the target.
        log_probs: The same, normalised, in float32.
        candidates: ``(batch, vocab)`` bool, the tokens that may move.
        removed: ``(batch, vocab)`` bool, the tokens that lose all their probability, if any.
        shift: Given a strength and the columns wanted, how far log-probs move, in nats, up to a
            constant per row.
        config: The rule and its settings.
        strength_scale: ``(batch,)`` factors of the strength; ``None`` for 1.
        context: ``(batch,)`` factors of all log-ratios within ``context_limit``, already in
            ``shift``; ``None`` for 1.
    """

    scores: Tensor
    log_probs: Tensor
    candidates: Tensor
    removed: Tensor | None
    shift: Callable[[Tensor | float, Columns], Tensor]
    config: FusionConfig
    strength_scale: Tensor | None = None
    context: Tensor | None = None

    def strength(self) -> Tensor:
        """``(batch,)`` strengths: the configured one, or less if a budget or the context lowers it.

        It is 0 for rows with NaN, which are returned unchanged.
        """
        strength = torch.where(_broken(self.log_probs), 0.0, self._within_budget()[0])
        if self.context is not None:
            strength = strength * self.context[:, None]
        return strength.squeeze(-1).to(self.log_probs.dtype)

    def fused(self) -> Tensor:
        """``(batch, vocab)`` normalised log-probs in the dtype of the scores."""
        strength, removed = self._within_budget()
        log_probs, candidates = self.log_probs, self.candidates
        moved = _move(log_probs, self.shift(strength, _all_columns), candidates, removed)
        moved = torch.where(candidates.any(-1, keepdim=True), moved, log_probs)
        scores = self.scores
        moved = torch.where(_broken(log_probs), scores.float(), moved)
        forbidden = torch.isneginf(scores)
        if removed is not None:
            forbidden |= removed & torch.isneginf(moved)
        # A log-prob below the smallest number of the dtype must not become -inf, which forbids it.
        smallest = max(torch.finfo(scores.dtype).min, torch.finfo(torch.float32).min)
        return moved.clamp_min(smallest).masked_fill(forbidden, -math.inf).to(scores.dtype)

    def _within_budget(self) -> tuple[Tensor | float, Tensor | None]:
        """``(batch, 1)`` largest strengths within the KL budget, and the tokens to remove.

        ``KL(f_a ‖ p)`` grows with ``a`` for every rule except under a soft-capped head, where
        bisection still ends within the budget. If removing the implausible tokens would by itself
        exceed the budget, they stay.
        """
        config, candidates, removed = self.config, self.candidates, self.removed
        max_strength: Tensor | float = config.strength
        if self.strength_scale is not None:
            max_strength = config.strength * self.strength_scale[:, None]
        count = int(candidates.sum(-1).max()) if config.kl_budget is not None else 0
        if config.kl_budget is None or count == 0:
            return max_strength, removed
        logs, index = self.log_probs.masked_fill(~candidates, -math.inf).topk(count, dim=-1)
        present = torch.isfinite(logs)
        own = torch.logsumexp(logs, -1, keepdim=True).exp()
        group = own
        if removed is not None:
            group = own + self.log_probs.exp().masked_fill(~removed, 0.0).sum(-1, keepdim=True)
            affordable = group * torch.log(group / own.clamp_min(1e-30)) <= config.kl_budget
            removed, group = removed & affordable, torch.where(affordable, group, own)

        def divergence(strength: Tensor) -> Tensor:
            steps = self.shift(strength, lambda values: values.gather(-1, index))
            tilted = (logs + steps).masked_fill(~present, -math.inf)
            total = torch.logsumexp(tilted, -1, keepdim=True)
            distribution = (tilted - total).exp().nan_to_num(nan=0.0)
            mean = torch.where(distribution > 0, distribution * steps, 0.0).sum(-1, keepdim=True)
            return (group * (mean - total + group.clamp_min(1e-30).log())).nan_to_num(nan=0.0)

        low = torch.zeros_like(own)
        high = largest = torch.zeros_like(own) + max_strength
        within = divergence(high) <= config.kl_budget
        for _ in range(14):
            middle = (low + high) / 2
            fits = divergence(middle) <= config.kl_budget
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(within, largest, low), removed


def fuse(
    scores: Tensor,
    clean: Tensor,
    reference: Tensor | None,
    mapped: Tensor,
    config: FusionConfig,
    strength_scale: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """Fuses the calibrator's distributions into the target's scores.

    Args:
        scores: ``(batch, vocab)`` logits or log-probs of the target; ``-inf`` forbids a token.
        clean: ``(batch, vocab)`` probabilities of the clean model in the target's vocabulary.
        reference: The same for the reference model; only the contrast rules read it.
        mapped: ``(vocab,)`` bool, the tokens that the vocabulary map reaches.
        config: The rule and its settings; ``context_kl`` is ignored here.
        strength_scale: ``(batch,)`` factors of the strength; 1 by default.
        context: ``(batch,)`` factors in 0..1 that ``context_kl`` gives; 1 by default. They scale
            the strength, except for log-ratios below ``-context_limit``.

    Returns:
        ``(batch, vocab)`` normalised log-probs in the dtype of ``scores``, or ``scores`` itself at
        strength 0. An input of ``-inf`` stays ``-inf``, and every other stays finite unless
        ``outside`` removes its token; rows with NaN are returned unchanged.

    Raises:
        DataError: The shapes differ.
    """
    for given in (clean, reference):
        if given is not None and given.shape != scores.shape:
            raise DataError(
                f"probabilities of shape {tuple(given.shape)} came with scores of shape "
                f"{tuple(scores.shape)}: pass one row for each row of scores"
            )
    if config.strength == 0:
        return scores
    return prepare(scores, clean, reference, mapped, config, strength_scale, context).fused()


def strength_used(
    scores: Tensor, clean: Tensor, reference: Tensor | None, mapped: Tensor, config: FusionConfig
) -> Tensor:
    """The strength that :func:`fuse` applies to each row, given the same arguments.

    Returns:
        ``(batch,)`` float32: ``config.strength``, or less if ``kl_budget`` lowers it; 0 for rows
        with NaN, which are returned unchanged.
    """
    return prepare(scores, clean, reference, mapped, config).strength()


def prepare(
    scores: Tensor,
    clean: Tensor,
    reference: Tensor | None,
    mapped: Tensor,
    config: FusionConfig,
    strength_scale: Tensor | None = None,
    context: Tensor | None = None,
) -> Fusion:
    """Prepares a step of a rule that works on distributions; arguments as in :func:`fuse`."""
    log_probs, candidates, removed = _select(scores, mapped, config)
    limited = config.contrasts and config.context_limit is not None and context is not None
    if context is not None and not limited:
        strength_scale, context = times(strength_scale, context), None
    if config.contrasts:
        assert reference is not None
        difference = log_ratio(clean, reference, config).masked_fill(~candidates, 0.0)
        if context is not None and config.context_limit is not None:
            always = (difference + config.context_limit).clamp_max(0.0)
            difference = context[:, None] * (difference - always) + always
        shift = _times(difference)
    elif config.rule == "product":
        # Without a floor, a probability of 0 counts as the smallest one of float32.
        shift = _times(torch.log(clean + config.floor).clamp_min(-_MAX_LOG) - log_probs)
    else:
        inside = log_probs.masked_fill(~candidates, -math.inf)
        inside = inside - torch.logsumexp(inside, dim=-1, keepdim=True)
        own = clean.masked_fill(~candidates, 0.0)
        own = own / own.sum(-1, keepdim=True).clamp_min(1e-30)

        def shift(strength: Tensor | float, columns: Columns) -> Tensor:
            target = columns(inside)
            return torch.log((1 - strength) * target.exp() + strength * columns(own)) - target

    return Fusion(scores, log_probs, candidates, removed, shift, config, strength_scale, context)


def prepare_aligned(
    scores: Tensor,
    projected: Tensor,
    known: Tensor,
    cap: float | None,
    config: FusionConfig,
    strength_scale: Tensor | None = None,
) -> Fusion:
    """Prepares a step of the aligned rule: last hidden states fused as logits (arXiv 2506.01266).

    The target's head is affine, ``W h + b``, and the weights of the fusion add up to 1, so
    ``W (a u + (1 - a) h) + b = a (W u + b) + (1 - a) (W h + b)``. A soft cap after the head,
    ``c tanh(x / c)``, is removed from the scores and applied again.

    Args:
        scores: ``(batch, vocab)`` logits of the target; log-probs too if the head has no cap.
        projected: ``(batch, vocab)`` the head's output for the calibrator's vectors ``u`` in the
            target's space, without the soft cap.
        known: ``(vocab,)`` bool, the columns that the head has.
        cap: The head's soft cap, if any.
        config: The settings.
        strength_scale: As in :func:`fuse`.
    """
    log_probs, candidates, removed = _select(scores, known, config)
    if cap is None:
        shift = _times((projected - log_probs).clamp(-_MAX_SHIFT, _MAX_SHIFT))
    else:
        bounded = (scores.float() / cap).clamp(-_SATURATED, _SATURATED)
        raw = cap * torch.atanh(bounded)
        # An earlier processor may have moved scores beyond the cap; keep that excess.
        rest = scores.float() - cap * bounded

        def shift(strength: Tensor | float, columns: Columns) -> Tensor:
            mixed = (1 - strength) * columns(raw) + strength * columns(projected)
            fused = cap * torch.tanh(mixed / cap) + (1 - strength) * columns(rest)
            return fused - columns(log_probs)

    return Fusion(scores, log_probs, candidates, removed, shift, config, strength_scale)


def log_ratio(clean: Tensor, reference: Tensor, config: FusionConfig) -> Tensor:
    """What non-toxic training changed: ``log q_clean - log q_reference``, denoised and bounded.

    Args:
        clean: Probabilities of any shape.
        reference: Probabilities of the same shape.
        config: ``floor``, ``threshold`` and ``clip`` are used.

    Returns:
        Nats within ``±clip``; negative for tokens that the clean model makes less likely.
    """
    ratio = torch.log((clean + config.floor) / (reference + config.floor))
    if not config.floor:  # 0 / 0 carries no information
        ratio = ratio.nan_to_num(nan=0.0, posinf=_MAX_LOG, neginf=-_MAX_LOG)
    if config.threshold:
        ratio = torch.nn.functional.softshrink(ratio, config.threshold)
    return ratio.clamp(-config.clip, config.clip)


def kl_divergence(one: Tensor, other: Tensor) -> Tensor:
    """``KL(one ‖ other)`` in nats, ``(batch,)``, of two ``(batch, vocab)`` tensors of log-probs."""
    probs = one.exp()
    return torch.where(probs > 0, probs * (one - other), 0.0).sum(-1)


def times(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The product of two factors, of which ``None`` is 1."""
    if one is None or other is None:
        return one if other is None else other
    return one * other


def fit(tensor: Tensor, width: int) -> Tensor:
    """Cuts the last dimension to ``width``, or pads it with zeros."""
    missing = width - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _select(
    scores: Tensor, mapped: Tensor, config: FusionConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs, the candidates, and the tokens to remove.

    Plausible tokens reach a given fraction of the top probability (Li et al. 2023, eq. 3).
    """
    log_probs = torch.log_softmax(scores.float(), dim=-1)
    plausible = log_probs > -math.inf
    if config.plausibility > 0:
        best = log_probs.amax(-1, keepdim=True)
        plausible = plausible & (log_probs >= best + math.log(config.plausibility))
    candidates = mapped & plausible
    return log_probs, candidates, mapped & ~candidates if config.outside == "remove" else None


def _times(difference: Tensor) -> Callable[[Tensor | float, Columns], Tensor]:
    return lambda strength, columns: strength * columns(difference)


def _all_columns(values: Tensor) -> Tensor:
    return values


def _broken(log_probs: Tensor) -> Tensor:
    """``(batch, 1)`` rows with NaN; a score of +inf, or only scores of -inf, also cause NaN."""
    return torch.isnan(log_probs).any(-1, keepdim=True)


def _move(log_probs: Tensor, shift: Tensor, candidates: Tensor, removed: Tensor | None) -> Tensor:
    """Adds ``shift`` to the candidates and rescales them to the mass they had as a group.

    The mass of ``removed`` tokens goes to the group too. A group that would lose everything is left
    as it is.
    """
    group = candidates if removed is None else candidates | removed
    mass = torch.logsumexp(log_probs.masked_fill(~group, -math.inf), -1, keepdim=True)
    shifted = (log_probs + shift).masked_fill(~candidates, -math.inf)
    total = torch.logsumexp(shifted, -1, keepdim=True)
    return torch.where(group & ~torch.isneginf(total), shifted + (mass - total), log_probs)
