"""Evaluation for contrastive training: separation of held-out wordings, and drift from the base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_detox.training.contrastive.batches import EncodedSet, collate, whole
from fusion_detox.training.contrastive.objectives import kl_to_base, mean_nll
from fusion_detox.training.data.blocks import Blocks
from fusion_detox.training.loss import IGNORED, bits_per_byte, summed_cross_entropy

Measures = dict[str, float | None]
MAX_ANCHORS, MAX_BLOCKS = 300, 100
"""How many held-out anchors and blocks of general text a training run evaluates."""
_ROWS = 4


class HeldOutAnchors:
    """Compares a model with its base on held-out anchors and general text.

    Args:
        sets: The anchors, with all their wordings.
        general: Blocks of general text, if there is any.
        byte_lengths: Bytes of each token id, 0 for special ones.
        batch: Blocks per forward pass; about four times as many wordings.
        autocast: Run in bfloat16 autocast.
        base: The base model; by default the measured PEFT model without its adapter.
    """

    def __init__(
        self,
        sets: Sequence[EncodedSet],
        general: Blocks | None,
        byte_lengths: Sequence[int],
        *,
        batch: int = 4,
        autocast: bool = False,
        base: Any = None,
    ) -> None:
        self._sets, self._general, self._batch, self._autocast = sets, general, batch, autocast
        self._base = base
        self._lengths = torch.tensor(byte_lengths)

    @property
    def sizes(self) -> dict[str, int]:
        """What is measured: anchors, their wordings, and blocks of general text."""
        return {
            "anchors": len(self._sets),
            "positives": sum(len(one.positives) for one in self._sets),
            "negatives": sum(len(one.negatives) for one in self._sets),
            "general_blocks": 0 if self._general is None else len(self._general),
        }

    @torch.no_grad()
    def __call__(self, model: Any) -> Measures:
        """Rounded measures by name; those for which there is no text are left out."""
        training = model.training
        model.eval()
        try:
            found = self._separation(model) if self._sets else {}
            if self._general is not None and len(self._general):
                found.update(self._drift(model, self._general))
        finally:
            model.train(training)
        return {name: None if value is None else round(value, 4) for name, value in found.items()}

    def _separation(self, model: Any) -> Measures:
        """Separation by nll, and by its difference from the base's (``ratio_``)."""
        parts = []
        for first, sets in self._batches():
            batch = collate([whole(one) for one in sets])
            logits, base_logits = self._logits(model, batch["input_ids"], batch["attention_mask"])
            labels = batch["labels"].to(logits.device)
            nll = mean_nll(logits, labels)
            change = (nll - mean_nll(base_logits, labels)) * (labels[:, 1:] != IGNORED).sum(1)
            parts.append((nll.cpu(), change.cpu(), batch["group"] + first, batch["positive"]))
        nll, change, group, positive = (torch.cat(column) for column in zip(*parts, strict=True))
        ratio = separation(change, group, positive)
        return {
            **separation(nll, group, positive),
            "ratio_auc_within": ratio["auc_within"],
            "ratio_auc_overall": ratio["auc_overall"],
        }

    def _batches(self) -> Iterator[tuple[int, list[EncodedSet]]]:
        """Batches of anchors, with few rows each, and the number of each batch's first anchor."""
        first, part, rows = 0, list[EncodedSet](), 0
        for number, one in enumerate(self._sets):
            size = len(one.positives) + len(one.negatives)
            if part and rows + size > _ROWS * self._batch:
                yield first, part
                first, part, rows = number, [], 0
            part.append(one)
            rows += size
        yield first, part

    def _drift(self, model: Any, general: Blocks) -> dict[str, float]:
        nats = base_nats = divergence = 0.0
        tokens = size = 0
        for start in range(0, len(general), self._batch):
            batch = [general[row] for row in range(start, min(start + self._batch, len(general)))]
            ids = torch.stack([row["input_ids"] for row in batch])
            labels = torch.stack([row["labels"] for row in batch])
            sizes = torch.where(labels == IGNORED, 0, self._lengths[labels.clamp_min(0)])
            # A special token has no bytes, so it must not cost bits.
            labels = labels.masked_fill(sizes == 0, IGNORED)
            keep = (labels[:, 1:] != IGNORED).any(1)
            ids, labels, sizes = ids[keep], labels[keep], sizes[keep]
            if not len(ids):
                continue
            # Padding is on the right, where it affects no counted token.
            logits, base_logits = self._logits(model, ids, torch.ones_like(ids))
            counts = (labels[:, 1:] != IGNORED).sum(1)
            labels = labels.to(logits.device)
            nats += float(summed_cross_entropy(logits, labels))
            base_nats += float(summed_cross_entropy(base_logits, labels))
            divergences = kl_to_base(logits, base_logits, labels).cpu().double()
            divergence += float(divergences @ counts.double())
            tokens += int(counts.sum())
            size += int(sizes[:, 1:].sum())
        return drift(nats, base_nats, divergence, tokens=tokens, size=size)

    def _logits(self, model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the model and of its base, on the model's device."""
        device = next(model.parameters()).device
        texts = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            logits = model(**texts).logits
            if self._base is not None:
                # Trainer moves only the trained model to the device.
                return logits, self._base.to(device)(**texts).logits
            with model.disable_adapter():
                return logits, model(**texts).logits


def separation(nll: Tensor, group: Tensor, positive: Tensor) -> Measures:
    """Measure how well the nll of texts separates negatives from positives.

    Args:
        nll: ``(rows,)`` mean negative log-likelihoods, in nats per token.
        group: ``(rows,)`` integers, the same for the rows of one anchor.
        positive: ``(rows,)`` booleans; at least one is true.

    Returns:
        ``positive_perplexity`` and ``negative_perplexity``, geometric means over texts.
        ``auc_within``, the probability that a negative's nll is above that of a positive of the
        same anchor (ties count half), averaged over the anchors that have both. ``auc_overall``,
        the same for a negative and a positive of any anchors. All but the first are ``None``
        without negatives.
    """
    nll, group, positive = nll.detach().double().cpu(), group.cpu(), positive.bool().cpu()
    above, below = nll[~positive], nll[positive]
    within = []
    for anchor in torch.unique(group[~positive]).tolist():
        own = group == anchor
        if (own & positive).any():
            within.append(auc(nll[own & ~positive], nll[own & positive]))
    return {
        "positive_perplexity": _exp(float(below.mean())),
        "negative_perplexity": _exp(float(above.mean())) if len(above) else None,
        "auc_within": sum(within) / len(within) if within else None,
        "auc_overall": auc(above, below) if len(above) else None,
    }


def drift(nats: float, base_nats: float, kl: float, *, tokens: int, size: int) -> dict[str, float]:
    """Bits per byte of a model and of its base, and KL(model ‖ base) per token, in nats.

    Args:
        nats: Summed negative log-likelihood of the model.
        base_nats: The same for the base model.
        kl: Summed KL divergence, in nats.
        tokens: Number of tokens.
        size: Number of bytes.
    """
    return {
        "bits_per_byte": bits_per_byte(nats, size),
        "base_bits_per_byte": bits_per_byte(base_nats, size),
        "kl": kl / max(tokens, 1),
    }


def auc(above: Tensor, below: Tensor) -> float:
    """Probability that a member of ``above`` exceeds one of ``below``; ties count half."""
    ranked = below.sort().values
    wins = torch.searchsorted(ranked, above) + torch.searchsorted(ranked, above, right=True)
    return float(wins.double().mean()) / (2 * len(below))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
