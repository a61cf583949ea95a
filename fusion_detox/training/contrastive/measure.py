"""What is measured in contrastive training: separation on held-out anchors, drift on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_detox.training.contrastive.batches import EncodedSet, collate, whole
from fusion_detox.training.contrastive.metrics import Drift, Separation, separation
from fusion_detox.training.contrastive.token_losses import kl_to_base, mean_nll
from fusion_detox.training.data.blocks import Blocks
from fusion_detox.training.loss import IGNORED, summed_cross_entropy

_ROWS = 4


class HeldOutAnchors:
    """Held-out anchors and general text, on which a model is compared with its base.

    Args:
        sets: The anchors, with all their wordings.
        general: Blocks of general text; ``None`` where there is none.
        byte_lengths: Bytes of each token id, 0 for special ones.
        batch: Blocks at a time; of wordings about four times as many.
        autocast: Whether to run in bfloat16 autocast.
        base: The model to compare with; by default the measured PEFT model without its adapter.
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

    def __call__(self, model: Any) -> dict[str, float | None]:
        """Flat, rounded numbers by name; those that there is no text for are left out."""
        training = model.training
        model.eval()
        try:
            found: dict[str, float | None] = {}
            if self._sets:
                plain, ratio = self.separation(model)
                found.update(plain.to_dict())
                found["ratio_auc_within"] = ratio.to_dict()["auc_within"]
                found["ratio_auc_overall"] = ratio.to_dict()["auc_overall"]
            if self._general is not None and len(self._general):
                found.update(self.drift(model).to_dict())
            return found
        finally:
            model.train(training)

    @torch.no_grad()
    def separation(self, model: Any) -> tuple[Separation, Separation]:
        """Of the held-out wordings: by their nll, and by its difference from the base's."""
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for start, sets in self._parts():
            batch = collate([whole(one) for one in sets])
            ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
            logits, base = self._logits(model, ids, mask), self._base_logits(model, ids, mask)
            own = mean_nll(logits, labels.to(logits.device)).cpu()
            change = (own - mean_nll(base, labels.to(base.device)).cpu()) * (
                labels[:, 1:] != IGNORED
            ).sum(1)
            parts.append((own, change, batch["group"] + start, batch["positive"]))
        nll, change, group, positive = (torch.cat(column) for column in zip(*parts, strict=True))
        return separation(nll, group, positive), separation(change, group, positive)

    def _parts(self) -> Iterator[tuple[int, list[EncodedSet]]]:
        """Anchors of few rows at a time, each part with the number of its first."""
        start, part, rows = 0, list[EncodedSet](), 0
        for at, one in enumerate(self._sets):
            size = len(one.positives) + len(one.negatives)
            if part and rows + size > _ROWS * self._batch:
                yield start, part
                start, part, rows = at, [], 0
            part.append(one)
            rows += size
        if part:
            yield start, part

    @torch.no_grad()
    def drift(self, model: Any) -> Drift:
        """From the base, on the held-out general text."""
        assert self._general is not None
        nats = base_nats = divergence = 0.0
        tokens = size = 0
        for start in range(0, len(self._general), self._batch):
            rows = range(start, min(start + self._batch, len(self._general)))
            batch = [self._general[row] for row in rows]
            ids = torch.stack([row["input_ids"] for row in batch])
            labels = torch.stack([row["labels"] for row in batch])
            mask = torch.ones_like(ids)  # padding comes last, where it changes nothing
            sizes = torch.where(labels == IGNORED, 0, self._lengths[labels.clamp_min(0)])
            # A special token has no bytes, and must not cost bits.
            labels = labels.masked_fill(sizes == 0, IGNORED)
            keep = (labels[:, 1:] != IGNORED).any(1)
            ids, labels, sizes, mask = ids[keep], labels[keep], sizes[keep], mask[keep]
            if not len(ids):
                continue
            logits = self._logits(model, ids, mask)
            base_logits = self._base_logits(model, ids, mask)
            there = labels.to(logits.device)
            counts = (labels[:, 1:] != IGNORED).sum(1)
            nats += float(summed_cross_entropy(logits, there))
            base_nats += float(summed_cross_entropy(base_logits, there))
            divergence += float(
                kl_to_base(logits, base_logits, there).cpu().double() @ counts.double()
            )
            tokens += int(counts.sum())
            size += int(sizes[:, 1:].sum())
        return Drift.of_sums(nats, base_nats, divergence, tokens, size)

    def _base_logits(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        if self._base is not None:  # Trainer moves the model alone
            base = self._base.to(next(model.parameters()).device)
            return self._logits(base, ids, mask)
        with model.disable_adapter():
            return self._logits(model, ids, mask)

    def _logits(self, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits
