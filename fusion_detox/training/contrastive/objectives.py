"""Contrastive perplexity (arXiv 2401.08491), and two losses in its place: pure functions.

Rows are texts; ``group`` says which anchor each belongs to and ``positive`` which are non-toxic.
They start from ``mean_nll`` of ``token_losses``, the logarithm of each text's perplexity. A row
acts on its own anchor only, so a batch may hold any anchors in any order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from fusion_detox.errors import DataError
from fusion_detox.training.contrastive.config import (
    Centroid,
    ContrastiveConfig,
    ContrastiveObjective,
    MarginKind,
    Perplexity,
    TemperatureIn,
)
from fusion_detox.training.contrastive.token_losses import kl_to_base, mean_nll

__all__ = [
    "ContrastiveConfig",
    "contrastive_perplexity_loss",
    "kl_to_base",
    "likelihood_ratio_loss",
    "mean_nll",
    "objective_loss",
    "positive_nll",
    "signed_margin_loss",
]

Reduction = Literal["mean", "none"]
HIGHEST_NLL = 30.0
"""Nats a token above which a perplexity counts as ``exp(30)``, and gets no gradient: a model that
knows nothing needs 12. Squares of it still fit into float32, as gradient clipping needs."""


def contrastive_perplexity_loss(
    nll: Tensor,
    group: Tensor,
    positive: Tensor,
    *,
    temperature: float = 0.1,
    negative_weight: float = 1.0,
    perplexity: Perplexity = "exp",
    centroid: Centroid = "moving",
    temperature_in: TemperatureIn = "scale",
    reduction: Reduction = "mean",
) -> Tensor:
    """−log J of each anchor: its positives against its negatives, by distance from a prototype.

    For an anchor i with positives P and negatives N (equations 1 to 6 of arXiv 2401.08491, as two
    notes on the paper give them)::

        φ(x) = exp(nll(x))                        c_i = mean of φ over P
        s(x) = 1/τ · exp(−|φ(x) − c_i|)           J_i = Σ_P s / (Σ_P s + α · Σ_N s)

    In this form τ cancels in J. ``temperature_in="exponent"`` gives it an effect:
    ``s(x) = exp(−|φ(x) − c_i| / τ)``. Without negatives J is 1, with no gradient. The distance has
    no sign: a negative below the prototype is pushed further down, thus made *more* likely;
    ``signed_margin_loss`` does not do so. All is computed in logarithms.

    Args:
        nll: ``(rows,)`` mean negative log-likelihoods, in nats a token.
        group: ``(rows,)`` integers, the same for the rows of one anchor.
        positive: ``(rows,)`` booleans.
        temperature: τ.
        negative_weight: α; 0 leaves the negatives out.
        perplexity: ``"log"`` takes φ = nll, whose gradient does not grow with the perplexity.
            With ``"exp"``, an nll counts as ``HIGHEST_NLL`` at most.
        centroid: Whether the gradient also flows through c (``"moving"``) or not (``"fixed"``).
        temperature_in: Where τ stands.
        reduction: ``"mean"`` over anchors, or ``"none"``.

    Returns:
        A scalar, or ``(anchors,)`` in ascending order of ``group``.

    Raises:
        DataError: An anchor has no positive, so it has no prototype.
    """
    positives, negatives = _members(group, positive)
    phi = nll if perplexity == "log" else nll.clamp(max=HIGHEST_NLL).exp()
    centre = _mean_over(positives, phi)
    if centroid == "fixed":
        centre = centre.detach()
    distance = (phi - centre.unsqueeze(1)).abs()
    if temperature_in == "scale":
        log_s = -distance - math.log(temperature)
    else:
        log_s = -distance / temperature
    log_alpha = math.log(negative_weight) if negative_weight else -math.inf
    weighted = torch.where(negatives, log_s + log_alpha, log_s)
    everyone = weighted.masked_fill(~(positives | negatives), -math.inf).logsumexp(1)
    ours = log_s.masked_fill(~positives, -math.inf).logsumexp(1)
    return _reduce(everyone - ours, reduction)


def signed_margin_loss(
    nll: Tensor,
    group: Tensor,
    positive: Tensor,
    *,
    margin: float = 1.0,
    kind: MarginKind = "hinge",
    centroid: Centroid = "moving",
    reduction: Reduction = "mean",
) -> Tensor:
    """How far each negative is from being less likely than its anchor's prototype by a margin.

    ``h(margin − (nll(x) − c_i))``, mean over the negatives x of an anchor, where c_i is the mean
    nll of its positives and h is ``max(0, ·)`` or softplus. Unlike the distance of
    ``contrastive_perplexity_loss`` it never makes a negative more likely. An anchor without
    negatives gives 0.

    Args:
        nll: ``(rows,)`` mean negative log-likelihoods, in nats a token.
        group: ``(rows,)`` integers, the same for the rows of one anchor.
        positive: ``(rows,)`` booleans.
        margin: In nats a token.
        kind: ``"hinge"`` rests once the margin is kept; ``"softplus"`` nearly does.
        centroid: With ``"moving"`` the positives are made more likely at the same time; with
            ``"fixed"`` the negatives alone bear the loss.
        reduction: ``"mean"`` over anchors, or ``"none"``.

    Returns:
        A scalar, or ``(anchors,)`` in ascending order of ``group``; nats a token.

    Raises:
        DataError: An anchor has no positive.
    """
    positives, negatives = _members(group, positive)
    centre = _mean_over(positives, nll)
    if centroid == "fixed":
        centre = centre.detach()
    lacking = margin - (nll - centre.unsqueeze(1))
    if kind == "hinge":
        penalty = lacking.clamp(min=0)
    else:
        penalty = torch.nn.functional.softplus(lacking)
    return _reduce(_mean_over(negatives, penalty), reduction)


def likelihood_ratio_loss(
    log_ratio: Tensor,
    group: Tensor,
    toxicity: Tensor,
    *,
    tilt: float = 10.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """How far a model's preferences among the wordings of an anchor are from those wanted.

    The likelihood ratio to a frozen base takes the place of the similarity in equation 3 of arXiv
    2401.08491: what is compared is what the model has *changed*, which is what the contrast rule
    reads. For an anchor's wordings x with toxicity g(x) in 0..1::

        r(x) = Σ_t log p(x_t|x_<t) − log p_base(x_t|x_<t)
        loss = KL(softmax(−λ·g) ‖ softmax(r))

    Its minimum is finite, r = −λ·g up to a constant, which is also the optimum of rewarding −g at a
    price of 1/λ a nat of KL from the base (Rafailov et al. 2023, arXiv 2305.18290). Wordings of
    equal toxicity are kept at equal ratios.

    Args:
        log_ratio: ``(rows,)`` r, in nats, summed over each row's counted tokens.
        group: ``(rows,)`` integers, the same for the rows of one anchor.
        toxicity: ``(rows,)`` g; 0 for positives and 1 for negatives where nothing finer is known.
        tilt: λ, in nats.
        reduction: ``"mean"`` over anchors, or ``"none"``.

    Returns:
        A scalar, or ``(anchors,)`` in ascending order of ``group``; nats.
    """
    anchors = torch.unique(group)
    own = group.unsqueeze(0) == anchors.unsqueeze(1)
    wanted = (-tilt * toxicity.to(log_ratio.dtype)).expand_as(own).masked_fill(~own, -math.inf)
    found = log_ratio.expand_as(own).masked_fill(~own, -math.inf)
    wanted, found = wanted.log_softmax(1), found.log_softmax(1)
    gap = torch.where(own, wanted, 0.0) - torch.where(own, found, 0.0)
    return _reduce((wanted.exp() * gap).sum(1), reduction)


def positive_nll(
    nll: Tensor, group: Tensor, positive: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Language modelling on the positives: the mean nll of each anchor's, in nats a token.

    Raises:
        DataError: An anchor has no positive.
    """
    return _reduce(_mean_over(_members(group, positive)[0], nll), reduction)


@dataclasses.dataclass(frozen=True)
class ObjectiveLoss:
    """What is minimised, and the terms that it is the weighted sum of, each a scalar."""

    total: Tensor
    contrast: Tensor
    language_modelling: Tensor
    kl: Tensor | None


def objective_loss(
    nll: Tensor,
    group: Tensor,
    positive: Tensor,
    *,
    objective: ContrastiveObjective,
    config: ContrastiveConfig,
    kl: Tensor | None = None,
    log_ratio: Tensor | None = None,
    toxicity: Tensor | None = None,
) -> ObjectiveLoss:
    """The loss of a batch under an objective's settings, anchors included.

    Args:
        nll: ``(rows,)`` of the paraphrases.
        group: ``(rows,)`` integers.
        positive: ``(rows,)`` booleans.
        objective: Which contrast.
        config: Its settings and the weights of what anchors it.
        kl: ``(general rows,)`` of ``kl_to_base`` on general text; ``None`` where there is none.
        log_ratio: ``(rows,)``, which the likelihood ratio needs.
        toxicity: ``(rows,)``, likewise; 0 for positives and 1 for negatives by default.

    Raises:
        DataError: An anchor has no positive.
    """
    if objective == "contrastive-perplexity":
        contrast = contrastive_perplexity_loss(
            nll,
            group,
            positive,
            temperature=config.temperature,
            negative_weight=config.negative_weight,
            perplexity=config.perplexity,
            centroid=config.centroid,
            temperature_in=config.temperature_in,
        )
    elif objective == "likelihood-ratio":
        assert log_ratio is not None
        grades = (~positive.bool()).to(log_ratio.dtype) if toxicity is None else toxicity
        contrast = likelihood_ratio_loss(log_ratio, group, grades, tilt=config.tilt)
    else:
        contrast = signed_margin_loss(
            nll,
            group,
            positive,
            margin=config.margin,
            kind=config.margin_kind,
            centroid=config.centroid,
        )
    lm_weight, kl_weight = config.anchor_weights(objective)
    modelling = positive_nll(nll, group, positive)
    total = contrast + lm_weight * modelling if lm_weight else contrast
    drift = None if kl is None else kl.mean()
    if drift is not None and kl_weight:
        total = total + kl_weight * drift
    return ObjectiveLoss(total, contrast, modelling, drift)


def _members(group: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """``(anchors, rows)`` masks: which rows are an anchor's positives, and which its negatives."""
    anchors = torch.unique(group)
    own = group.unsqueeze(0) == anchors.unsqueeze(1)
    positives, negatives = own & positive.bool(), own & ~positive.bool()
    bare = (~positives.any(1)).nonzero().flatten().tolist()
    if bare:
        raise DataError(
            f"anchor {int(anchors[bare[0]])} has no positive, so there is no prototype to compare "
            "its negatives with: give each anchor at least one non-toxic wording"
        )
    return positives, negatives


def _mean_over(mask: Tensor, values: Tensor) -> Tensor:
    """``(anchors,)`` mean of ``(rows,)`` or ``(anchors, rows)`` where the mask holds; 0 of none."""
    total = torch.where(mask, values, torch.zeros_like(values)).sum(1)
    return total / mask.sum(1).clamp(min=1)


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    return values.mean() if reduction == "mean" else values
