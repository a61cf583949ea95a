"""The fusion rules: pure functions of log-probs. No state, no models, no tokenizers.

Every rule moves probability only among the tokens that it *judges*: those that the vocabulary map
reaches and that are plausible under the target. The judged tokens keep their mass as a group, and
all others keep their probability, so that end-of-text neither swells nor vanishes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusion_detox.config import FusionConfig

_LARGEST = 104.0


def fuse(
    scores: Tensor, clean: Tensor, reference: Tensor | None, mapped: Tensor, config: FusionConfig
) -> Tensor:
    """Fuses the calibrator's distributions into the target's scores.

    Args:
        scores: ``(batch, vocab)`` logits or log-probs of the target; ``-inf`` forbids a token.
        clean: ``(batch, vocab)`` probabilities of the clean model in the target's vocabulary.
        reference: Likewise, of the reference; only the contrast rule reads it.
        mapped: ``(vocab,)`` which tokens the calibrator can judge.
        config: The rule and its settings.

    Returns:
        ``(batch, vocab)`` normalised log-probs in the dtype of ``scores``; ``scores`` itself at
        strength 0. Where an input is ``-inf`` the output is too; rows with NaN come back as they
        were.
    """
    if config.strength == 0:
        return scores
    log_probs = torch.log_softmax(scores.float(), dim=-1)
    judged = mapped & _plausible(log_probs, config.plausibility)
    if config.rule == "contrast":
        assert reference is not None
        difference = log_ratio(clean, reference, config).masked_fill(~judged, 0.0)
        shift = difference * _strength(log_probs, difference, judged, config)
    elif config.rule == "product":
        calibrated = torch.log(clean + config.floor)
        shift = config.strength * (calibrated - log_probs)
    else:
        inside = log_probs.masked_fill(~judged, -math.inf)
        group = torch.logsumexp(inside, dim=-1, keepdim=True)
        own = clean.masked_fill(~judged, 0.0)
        own = own / own.sum(-1, keepdim=True).clamp_min(1e-30)
        mixed = torch.log((1 - config.strength) * (inside - group).exp() + config.strength * own)
        shift = mixed - (inside - group)
    dropped = mapped & ~judged if config.outside == "remove" else None
    moved = _move(log_probs, shift, judged, dropped)
    moved = torch.where(judged.any(-1, keepdim=True), moved, log_probs)
    broken = torch.isnan(log_probs).any(-1, keepdim=True)  # also where +inf or all -inf
    return torch.where(broken, scores.float(), moved).to(scores.dtype)


def strength_used(
    scores: Tensor, clean: Tensor, reference: Tensor | None, mapped: Tensor, config: FusionConfig
) -> Tensor:
    """The strength that :func:`fuse` applies to each row, of the same arguments.

    Returns:
        ``(batch,)`` in float32: ``config.strength``, or less where ``kl_budget`` lowers it; 0 for
        rows with NaN, which come back as they were.
    """
    log_probs = torch.log_softmax(scores.float(), dim=-1)
    strength: Tensor | float = config.strength
    if config.rule == "contrast" and config.strength:
        assert reference is not None
        judged = mapped & _plausible(log_probs, config.plausibility)
        difference = log_ratio(clean, reference, config).masked_fill(~judged, 0.0)
        strength = _strength(log_probs, difference, judged, config)
    broken = torch.isnan(log_probs).any(-1, keepdim=True)  # also where +inf or all -inf
    return torch.where(broken, 0.0, strength).squeeze(-1).to(log_probs.dtype)


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


def kl_divergence(fused: Tensor, target: Tensor) -> Tensor:
    """``KL(fused || target)`` in nats, ``(batch,)``, of two tensors of log-probs."""
    probs = fused.exp()
    return torch.where(probs > 0, probs * (fused - target), 0.0).sum(-1)


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


def _strength(
    log_probs: Tensor, difference: Tensor, judged: Tensor, config: FusionConfig
) -> Tensor | float:
    """The strength of each row, ``(batch, 1)``: the largest that keeps to the KL budget.

    ``KL(f_a || p)`` grows with ``a`` (its derivative is ``a`` times a variance), so bisection
    finds the border. Only judged tokens move, and only those that differ change the sums.
    """
    if config.kl_budget is None:
        return config.strength
    weight = log_probs.exp().masked_fill(~judged, 0.0)
    total = weight.sum(-1, keepdim=True)
    count = int(judged.sum(-1).max())
    if count == 0:
        return config.strength
    probs, index = weight.topk(count, dim=-1)
    steps = difference.gather(-1, index)

    def divergence(strength: Tensor) -> Tensor:
        tilted = probs * torch.exp(strength * steps)
        mass = tilted.sum(-1, keepdim=True).clamp_min(1e-30)
        mean = (tilted * steps).sum(-1, keepdim=True) / mass
        return total * (strength * mean - torch.log(mass / total.clamp_min(1e-30)))

    low = torch.zeros_like(total)
    high = torch.full_like(total, config.strength)
    within = divergence(high) <= config.kl_budget
    for _ in range(14):
        middle = (low + high) / 2
        fits = divergence(middle) <= config.kl_budget
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(within, torch.full_like(low, config.strength), low)
