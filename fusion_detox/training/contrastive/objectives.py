"""Contrastive perplexity (arXiv 2401.08491), two alternative objectives, and their token losses.

All functions are pure. Rows are texts; ``group`` gives the anchor of each row and ``positive``
marks the non-toxic ones. A row affects only its own anchor, so a batch may hold any anchors in any
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

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
from fusion_detox.training.loss import IGNORED

Reduction = Literal["mean", "none"]
HIGHEST_NLL = 30.0
"""Cap on the nll per token, in nats, before exponentiation; above it the gradient is 0.

An untrained model stays below 12. The square of ``exp(30)`` still fits into float32, which gradient
clipping needs."""


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the counted tokens of each row, in nats per token.

    This is the logarithm of a text's perplexity, equation 1 of arXiv 2401.08491. Tokens labelled
    ``IGNORED`` (padding, prompts, the leading BOS) do not count, so a row's value does not depend
    on its neighbours. Only slices of the logits are held in float32 (float64 is kept).

    Args:
        logits: ``(rows, length, vocab)``; position ``t`` predicts ``labels[:, t + 1]``.
        labels: ``(rows, length)`` token ids; ``IGNORED`` for tokens that do not count.

    Returns:
        ``(rows,)``, float32 or float64.

    Raises:
        DataError: A row has no counted token, so it has no mean.
    """
    rows, positions, targets, counts = _counted(labels)

    def loss(part: Tensor, span: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(part, targets[span], reduction="none")

    return _row_means(logits, positions, rows, counts, loss)


def kl_to_base(logits: Tensor, base_logits: Tensor, labels: Tensor) -> Tensor:
    """KL(model ‖ base) of the next-token distributions, averaged over each row's counted tokens.

    ``evaluate`` uses the same direction for its KL on harmless text.

    Args:
        logits: ``(rows, length, vocab)`` of the model in training.
        base_logits: The same shape, from the frozen base model; it gets no gradient.
        labels: ``(rows, length)``; a distribution counts if the token it predicts is not
            ``IGNORED``.

    Returns:
        ``(rows,)`` in nats per token, float32 or float64.

    Raises:
        DataError: A row has no counted token.
    """
    rows, positions, _, counts = _counted(labels)
    base = base_logits.detach().reshape(-1, base_logits.shape[-1])

    def divergence(part: Tensor, span: slice) -> Tensor:
        log_probs = part.log_softmax(-1)
        base_log_probs = _wide(base[positions[span]]).to(part.dtype).log_softmax(-1)
        # A token that both models exclude adds nothing; otherwise -inf - -inf would be NaN.
        gap = (log_probs - base_log_probs).masked_fill(log_probs == -math.inf, 0.0)
        return (log_probs.exp() * gap).sum(-1)

    return _row_means(logits, positions, rows, counts, divergence)


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
    """Contrastive perplexity: −log J per anchor, from distances to the anchor's prototype.

    For an anchor i with positives P and negatives N (equations 1 to 6 of arXiv 2401.08491, as
    given by two published notes on the paper)::

        φ(x) = exp(nll(x))                        c_i = mean of φ over P
        s(x) = 1/τ · exp(−|φ(x) − c_i|)           J_i = Σ_P s / (Σ_P s + α · Σ_N s)

    In this form τ cancels in J. ``temperature_in="exponent"`` gives it an effect:
    ``s(x) = exp(−|φ(x) − c_i| / τ)``. Without negatives J is 1 and has no gradient. The distance
    has no sign: a negative whose perplexity is below the prototype is pushed further down, which
    makes it *more* likely. ``signed_margin_loss`` avoids this. All terms are computed in log space.

    Args:
        nll: ``(rows,)`` mean negative log-likelihoods, in nats per token.
        group: ``(rows,)`` integers, the same for the rows of one anchor.
        positive: ``(rows,)`` booleans.
        temperature: τ.
        negative_weight: α; 0 ignores the negatives.
        perplexity: ``"log"`` uses φ = nll, whose gradient does not grow with the perplexity.
            ``"exp"`` clamps nll to ``HIGHEST_NLL``.
        centroid: ``"moving"`` lets the gradient flow through c; ``"fixed"`` detaches c.
        temperature_in: ``"scale"`` divides s by τ; ``"exponent"`` divides the distance by τ.
        reduction: ``"mean"`` over anchors, or ``"none"``.

    Returns:
        A scalar, or ``(anchors,)`` in ascending order of ``group``.

    Raises:
        DataError: An anchor has no positive and therefore no prototype.
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
    """Hinge loss that makes each negative less likely than its anchor's prototype by a margin.

    The loss is ``h(margin − (nll(x) − c_i))``, averaged over the negatives x of an anchor. c_i is
    the mean nll of its positives, and h is ``max(0, ·)`` or softplus. Unlike
    ``contrastive_perplexity_loss``, it never makes a negative more likely. An anchor without
    negatives has loss 0.

    Args:
        nll: ``(rows,)`` mean negative log-likelihoods, in nats per token.
        group: ``(rows,)`` integers, the same for the rows of one anchor.
        positive: ``(rows,)`` booleans.
        margin: In nats per token.
        kind: ``"hinge"`` has no gradient beyond the margin; ``"softplus"`` keeps a small one.
        centroid: ``"moving"`` also makes the positives more likely; ``"fixed"`` only makes the
            negatives less likely.
        reduction: ``"mean"`` over anchors, or ``"none"``.

    Returns:
        A scalar, or ``(anchors,)`` in ascending order of ``group``; nats per token.

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
    """KL divergence between target and actual preferences among the wordings of an anchor.

    It replaces the similarity of equation 3 of arXiv 2401.08491 with the likelihood ratio to a
    frozen base, so it measures only what the model has *changed*. The contrast rule reads the same
    ratio. For an anchor's wordings x with toxicity g(x) in 0..1::

        r(x) = Σ_t log p(x_t|x_<t) − log p_base(x_t|x_<t)
        loss = KL(softmax(−λ·g) ‖ softmax(r))

    The minimum is finite: r = −λ·g up to a constant. It is also the optimum of the reward −g with a
    penalty of 1/λ per nat of KL from the base (Rafailov et al. 2023, arXiv 2305.18290). Wordings of
    equal toxicity get equal ratios.

    Args:
        log_ratio: ``(rows,)`` r, in nats, summed over each row's counted tokens.
        group: ``(rows,)`` integers, the same for the rows of one anchor.
        toxicity: ``(rows,)`` g; use 0 for positives and 1 for negatives if no scores are known.
        tilt: λ, in nats.
        reduction: ``"mean"`` over anchors, or ``"none"``.

    Returns:
        A scalar, or ``(anchors,)`` in ascending order of ``group``; nats.
    """
    own = _own_rows(group)[1]
    wanted = (-tilt * toxicity.to(log_ratio.dtype)).expand_as(own).masked_fill(~own, -math.inf)
    found = log_ratio.expand_as(own).masked_fill(~own, -math.inf)
    wanted, found = wanted.log_softmax(1), found.log_softmax(1)
    gap = torch.where(own, wanted, 0.0) - torch.where(own, found, 0.0)
    return _reduce((wanted.exp() * gap).sum(1), reduction)


def positive_nll(
    nll: Tensor, group: Tensor, positive: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Language-modelling loss: the mean nll of each anchor's positives, in nats per token.

    Raises:
        DataError: An anchor has no positive.
    """
    return _reduce(_mean_over(_members(group, positive)[0], nll), reduction)


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
) -> Tensor:
    """Loss of a batch: the objective plus weighted language modelling and KL, as a scalar.

    Args:
        nll: ``(rows,)`` mean negative log-likelihoods of the wordings.
        group: ``(rows,)`` integers, the same for the rows of one anchor.
        positive: ``(rows,)`` booleans.
        objective: Which contrastive loss to use.
        config: Settings of the objective and weights of the other terms.
        kl: ``(general rows,)`` of ``kl_to_base`` on general text, if there is any.
        log_ratio: ``(rows,)``; required by ``likelihood-ratio``.
        toxicity: ``(rows,)`` for ``likelihood-ratio``; 0 for positives and 1 for negatives by
            default.

    Raises:
        DataError: An anchor has no positive.
    """
    if objective == "contrastive-perplexity":
        loss = contrastive_perplexity_loss(
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
        loss = likelihood_ratio_loss(log_ratio, group, grades, tilt=config.tilt)
    else:
        loss = signed_margin_loss(
            nll,
            group,
            positive,
            margin=config.margin,
            kind=config.margin_kind,
            centroid=config.centroid,
        )
    lm_weight, kl_weight = config.anchor_weights(objective)
    if lm_weight:
        loss = loss + lm_weight * positive_nll(nll, group, positive)
    if kl is not None and kl_weight:
        loss = loss + kl_weight * kl.mean()
    return loss


def _own_rows(group: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors in ascending order, and an ``(anchors, rows)`` mask of the rows of each."""
    anchors = torch.unique(group)
    return anchors, group.unsqueeze(0) == anchors.unsqueeze(1)


def _members(group: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """``(anchors, rows)`` masks of the positives and of the negatives of each anchor."""
    anchors, own = _own_rows(group)
    positives, negatives = own & positive.bool(), own & ~positive.bool()
    bare = (~positives.any(1)).nonzero().flatten().tolist()
    if bare:
        raise DataError(
            f"anchor {int(anchors[bare[0]])} has no positive, so its negatives have no prototype "
            "to be compared with: give each anchor at least one non-toxic wording"
        )
    return positives, negatives


def _mean_over(mask: Tensor, values: Tensor) -> Tensor:
    """``(anchors,)`` means of ``(rows,)`` or ``(anchors, rows)`` under a mask; 0 if it is empty."""
    total = torch.where(mask, values, torch.zeros_like(values)).sum(1)
    return total / mask.sum(1).clamp(min=1)


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    return values.mean() if reduction == "mean" else values


def _counted(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, flat position before it, and id of each counted token; and the count of each row."""
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    counted = following != IGNORED
    counts = counted.sum(1)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"row {empty[0]} of {len(labels)} has no counted token, so it has no perplexity: its "
            "text is empty, or no token remains after removing the prompt and truncating to the "
            "context"
        )
    positions = counted.flatten().nonzero().flatten()
    rows = positions.div(labels.shape[1], rounding_mode="floor")
    return rows, positions, following.flatten()[positions], counts


def _row_means(
    logits: Tensor,
    positions: Tensor,
    rows: Tensor,
    counts: Tensor,
    function: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    values: Tensor = _InSlices.apply(flat, positions, function)  # type: ignore[no-untyped-call]
    return values.new_zeros(len(counts)).index_add(0, rows, values) / counts


class _InSlices(torch.autograd.Function):
    """A function of some rows of logits, applied slice by slice and recomputed for the gradient.

    ``function(part, span)`` gets float32 logits (float64 is kept) and their range among
    ``positions``, and returns one value per row.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, positions: Tensor, function: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(logits, positions)
        ctx.function = function
        spans = _spans(positions)
        return torch.cat([function(_wide(logits[positions[span]]), span) for span in spans])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, positions = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for span in _spans(positions):
            part = _wide(logits[positions[span]]).detach().requires_grad_()
            with torch.enable_grad():
                values = ctx.function(part, span)
            (found,) = torch.autograd.grad(values, part, output_gradients[0][span])
            gradient[positions[span]] = found.to(gradient.dtype)
        return gradient, None, None


def _spans(positions: Tensor) -> list[slice]:
    """Slices small enough for a CPU's cache, or large enough to keep a GPU busy."""
    size = 16 if positions.device.type == "cpu" else 1024
    return [slice(start, start + size) for start in range(0, len(positions), size)]


def _wide(part: Tensor) -> Tensor:
    return part if part.dtype == torch.float64 else part.float()
