"""Trainer for contrastive objectives, and the contrastive stage of ``train_calibrator``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from fusion_detox.errors import DataError
from fusion_detox.training.contrastive.batches import (
    AnchorDraws,
    ContrastText,
    EncodedSet,
    check_sets,
    collate,
    encode_sets,
)
from fusion_detox.training.contrastive.config import ContrastiveConfig, ContrastiveObjective
from fusion_detox.training.contrastive.measure import MAX_ANCHORS, MAX_BLOCKS, HeldOutAnchors
from fusion_detox.training.contrastive.objectives import kl_to_base, mean_nll, objective_loss
from fusion_detox.training.data.blocks import Blocks, byte_lengths
from fusion_detox.training.data.text_blocks import kl_anchor_blocks
from fusion_detox.training.loss import IGNORED
from fusion_detox.training.progress import ProgressCallback
from fusion_detox.training.stage import StageTrainer, common_arguments, run_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.training.config import TrainingConfig
    from fusion_detox.training.finetuning.config import FinetuneConfig
    from fusion_detox.training.run import Run

logger = logging.getLogger(__name__)


class ContrastiveTrainer(StageTrainer):
    """``Trainer`` whose loss is a contrastive objective, averaged over whole anchors.

    All micro-batches hold the same number of anchors, so the mean over micro-batches and processes
    is the mean over all anchors of the step. ``base`` is the frozen base model; ``None`` means the
    trained PEFT model without its adapter.
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
        """Loss of a micro-batch made by ``collate``."""
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels, log_ratio, kl = inputs["labels"], None, None
        outputs = model(**texts)
        nll = mean_nll(outputs.logits, labels)
        if self.objective == "likelihood-ratio":
            counts = (labels[:, 1:] != IGNORED).sum(1)
            log_ratio = (mean_nll(self._base_logits(model, texts), labels) - nll) * counts
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
            log_ratio=log_ratio,
            toxicity=inputs["toxicity"],
        )
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _base_logits(self, model: Any, texts: dict[str, Tensor]) -> Any:
        if self.base is not None:
            return self.base.to(texts["input_ids"].device)(**texts).logits
        plain: Any = self.accelerator.unwrap_model(model)
        with plain.disable_adapter():
            return plain(**texts).logits


def anchor_arguments(folder: Path, config: TrainingConfig | FinetuneConfig) -> dict[str, Any]:
    """``TrainingArguments`` shared by all trainings on anchors."""
    return {
        **common_arguments(folder, config),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "lr_scheduler_type": "linear",
    }


def contrastive_trainer(
    model: Any,
    arguments: dict[str, Any],
    progress: ProgressCallback,
    *,
    sets: Sequence[EncodedSet],
    general: Blocks | None,
    step_anchors: int,
    objective: ContrastiveObjective,
    contrast: ContrastiveConfig,
    precision: str,
    pad_id: int,
    base: Any = None,
) -> ContrastiveTrainer:
    """A trainer of ``model`` on ``step_anchors`` anchors per step.

    Args:
        model: A plain model if ``base`` is given, otherwise a PEFT model.
        arguments: Arguments of ``TrainingArguments``.
        progress: The trainer's callback.
        sets: The anchors.
        general: Text for the KL divergence from the base model; unused if its weight is 0.
        step_anchors: Anchors per step, over all processes and micro-batches.
        objective: Which contrastive loss to use.
        contrast: Its settings.
        precision: ``"float32"``, or ``"bfloat16"`` for autocast.
        pad_id: Padding token.
        base: The frozen base model.
    """
    draws = AnchorDraws(
        sets,
        arguments["max_steps"] * step_anchors,
        positives=contrast.positives,
        negatives=contrast.negatives,
        general=general if contrast.anchor_weights(objective)[1] else None,
        seed=arguments["seed"],
    )
    trainer = ContrastiveTrainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=draws,
        data_collator=functools.partial(collate, pad_id=pad_id),
        callbacks=[progress],
    )
    trainer.precision, trainer.base = precision, base
    trainer.objective, trainer.contrast = objective, contrast
    # Otherwise Trainer assumes that a model accepting any keyword scales its loss by tokens.
    trainer.model_accepts_loss_kwargs = False
    return trainer


class ContrastStage:
    """Training stage in which a clean model learns a contrastive objective.

    Args:
        run: The training run.
        tokenizer: The tokenizer of both models.
        bos_id: The token that begins a text.
        text: What to train and evaluate on.
        contrast: The objective's settings.
        reference: The frozen base of KL divergence and likelihood ratio. Fusion applies the
            difference between the clean model and this one.

    Raises:
        DataError: There is no usable paraphrase set.
    """

    def __init__(
        self,
        run: Run,
        tokenizer: PreTrainedTokenizerBase,
        bos_id: int,
        text: ContrastText,
        contrast: ContrastiveConfig,
        reference: PreTrainedModel,
    ) -> None:
        self._run, self._bos_id, self._contrast = run, bos_id, contrast
        frozen: Any = reference
        self._reference = frozen.eval().requires_grad_(False)
        config = self._config = run.config
        assert config.objective != "language-modelling"
        self._objective = config.objective
        encode = functools.partial(
            encode_sets, tokenizer, bos_id=bos_id, context_length=config.context_length
        )
        check_sets([*text.sets, *text.held_sets])
        self._sets = encode(text.sets)
        if contrast.negatives and not any(one.negatives for one in self._sets):
            raise DataError("no paraphrase set has a negative: add toxic wordings")
        lm_weight, kl_weight = contrast.anchor_weights(self._objective)
        blocks = functools.partial(kl_anchor_blocks, tokenizer, bos_id, config=config)
        count = config.objective_steps * config.anchors
        self._kl_anchor_text = blocks(text.kl_anchor_text, count) if kl_weight else None
        if kl_weight and self._kl_anchor_text is None:
            logger.warning(
                "there is no clean or general text, so nothing keeps the model from changing on "
                "harmless text: give some with --clean"
            )
        self.weights = {
            "lm_weight": lm_weight,
            "kl_weight": 0.0 if self._kl_anchor_text is None else kl_weight,
        }
        self.measure = HeldOutAnchors(
            encode(text.held_sets[:MAX_ANCHORS]),
            blocks(text.held_kl_anchor_text, MAX_BLOCKS),
            byte_lengths(tokenizer),
            batch=8,
            autocast=config.precision != "float32",
            base=self._reference,
        )

    def __call__(self, model: PreTrainedModel, folder: Path) -> list[dict[str, float | None]]:
        """Train ``model`` in place, resuming from a checkpoint in ``folder``; return its curve."""
        config, run = self._config, self._run
        arguments = {
            **anchor_arguments(folder, config),
            "max_steps": config.objective_steps,
            "per_device_train_batch_size": config.anchors // run.world_size,
            "learning_rate": config.objective_learning_rate,
            "warmup_steps": min(20, config.objective_steps // 2),
            "weight_decay": 0.0,
            "adam_beta2": 0.95,
            "max_grad_norm": config.max_gradient_norm,
            "logging_steps": 1,  # the callback averages
        }
        progress = ProgressCallback(
            self._objective,
            self.measure,
            every=config.evaluate_every,
            shown=("ratio_auc_within", "kl"),
            show=run.show_progress and run.is_main,
            file=folder / "curve.json",
        )
        trainer = contrastive_trainer(
            model,
            arguments,
            progress,
            sets=self._sets,
            general=self._kl_anchor_text,
            step_anchors=config.anchors,
            objective=self._objective,
            contrast=self._contrast,
            precision=config.precision,
            pad_id=self._bos_id,
            base=self._reference,
        )
        run_trainer(trainer, progress, folder)
        return progress.curve
