"""``transformers.Trainer`` for the contrastive objectives, of an adapter or of a calibrator."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from fusion_detox.training.contrastive.batches import AnchorDraws, collate
from fusion_detox.training.contrastive.config import ContrastiveConfig, ContrastiveObjective
from fusion_detox.training.contrastive.objectives import objective_loss
from fusion_detox.training.contrastive.token_losses import kl_to_base, mean_nll
from fusion_detox.training.loss import IGNORED
from fusion_detox.training.progress import ProgressCallback
from fusion_detox.training.stage import StageTrainer

ANCHOR_ARGUMENTS = {
    "dataloader_pin_memory": torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,
}
"""What every training on anchors tells ``TrainingArguments``."""


class ContrastiveTrainer(StageTrainer):
    """``Trainer`` whose loss is the mean over whole anchors of a contrastive objective.

    Every micro-batch holds as many anchors as any other, so the mean over micro-batches and
    processes is the mean over all anchors of the step. ``base`` is the frozen model to compare
    with; ``None`` for the trained PEFT model itself without its adapter.
    """

    objective: ContrastiveObjective
    contrast: ContrastiveConfig
    base: Any = None
    loss_is_scaled_for_ga: bool | None = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch of ``collate``."""
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels, ratio, kl = inputs["labels"], None, None
        outputs = model(**texts)
        nll = mean_nll(outputs.logits, labels)
        if self.objective == "likelihood-ratio":
            counts = (labels[:, 1:] != IGNORED).sum(1)
            ratio = (mean_nll(self._base_logits(model, texts), labels) - nll) * counts
        if "general_input_ids" in inputs:
            general = {name: inputs[f"general_{name}"] for name in texts}
            kl = kl_to_base(
                model(**general).logits,
                self._base_logits(model, general),
                inputs["general_labels"],
            )
        loss = objective_loss(
            nll,
            inputs["group"],
            inputs["positive"],
            objective=self.objective,
            config=self.contrast,
            kl=kl,
            log_ratio=ratio,
            toxicity=inputs["toxicity"],
        ).total
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _base_logits(self, model: Any, texts: dict[str, Tensor]) -> Tensor:
        if self.base is None:
            plain: Any = self.accelerator.unwrap_model(model)
            with plain.disable_adapter():
                found: Tensor = plain(**texts).logits
            return found
        found = self.base.to(texts["input_ids"].device)(**texts).logits
        return found


def contrastive_trainer(
    model: Any,
    arguments: dict[str, Any],
    draws: AnchorDraws,
    watch: ProgressCallback,
    *,
    objective: ContrastiveObjective,
    contrast: ContrastiveConfig,
    precision: str,
    pad_id: int,
    base: Any = None,
) -> ContrastiveTrainer:
    """A trainer of ``model`` on anchors; ``arguments`` are those of ``TrainingArguments``."""
    trainer = ContrastiveTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=draws,
        data_collator=functools.partial(collate, pad_id=pad_id),
        callbacks=[watch],
    )
    trainer.precision, trainer.base = precision, base
    trainer.objective, trainer.contrast = objective, contrast
    # Else a model that takes any keyword counts as one that scales its loss by tokens.
    trainer.model_accepts_loss_kwargs = False
    return trainer
