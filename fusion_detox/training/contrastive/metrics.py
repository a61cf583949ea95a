"""How well a model tells wordings apart: perplexities, and the separation of the two kinds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fusion_detox.training.loss import bits_per_byte


@dataclasses.dataclass(frozen=True)
class Separation:
    """Positives against negatives.

    Attributes:
        positive_perplexity: Geometric mean over the positives of a text's perplexity.
        negative_perplexity: Likewise of the negatives; ``None`` where there are none.
        auc_within: Probability that a negative's nll is above that of a positive of the same anchor
            (ties count half), mean over the anchors that have both; ``None`` without one.
        auc_overall: The same for a negative and a positive of any anchors.
    """

    positive_perplexity: float
    negative_perplexity: float | None
    auc_within: float | None
    auc_overall: float | None

    def to_dict(self) -> dict[str, Any]:
        """Rounded, JSON-ready."""
        return {
            name: None if value is None else round(value, 4)
            for name, value in dataclasses.asdict(self).items()
        }


@dataclasses.dataclass(frozen=True)
class Drift:
    """What became of general text.

    Attributes:
        bits_per_byte: Bits that the model needs for a byte.
        base_bits_per_byte: Bits that the base model needs.
        kl: KL(model ‖ base) of the next token, in nats, mean over all tokens.
    """

    bits_per_byte: float
    base_bits_per_byte: float
    kl: float

    @classmethod
    def of_sums(cls, nats: float, base_nats: float, kl: float, tokens: int, size: int) -> Drift:
        """From sums in nats over ``tokens`` tokens of ``size`` bytes."""
        return cls(bits_per_byte(nats, size), bits_per_byte(base_nats, size), kl / max(tokens, 1))

    def to_dict(self) -> dict[str, float]:
        """Rounded, JSON-ready."""
        return {name: round(value, 4) for name, value in dataclasses.asdict(self).items()}


def separation(nll: Tensor, group: Tensor, positive: Tensor) -> Separation:
    """Measures texts of any number of anchors.

    Args:
        nll: ``(rows,)`` mean negative log-likelihoods, in nats a token.
        group: ``(rows,)`` integers, the same for the rows of one anchor.
        positive: ``(rows,)`` booleans; at least one is true.
    """
    nll, group, positive = nll.detach().double().cpu(), group.cpu(), positive.bool().cpu()
    above, below = nll[~positive], nll[positive]
    within = []
    for anchor in torch.unique(group[~positive]).tolist():
        own = group == anchor
        if (own & positive).any():
            within.append(auc(nll[own & ~positive], nll[own & positive]))
    return Separation(
        positive_perplexity=_exp(float(below.mean())),
        negative_perplexity=_exp(float(above.mean())) if len(above) else None,
        auc_within=sum(within) / len(within) if within else None,
        auc_overall=auc(above, below) if len(above) and len(below) else None,
    )


def auc(above: Tensor, below: Tensor) -> float:
    """Probability that a member of ``above`` exceeds one of ``below``; ties count half."""
    ranked = below.sort().values
    wins = torch.searchsorted(ranked, above) + torch.searchsorted(ranked, above, right=True)
    return float(wins.double().mean()) / (2 * len(below))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
