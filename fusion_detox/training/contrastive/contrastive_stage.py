"""The stage in which a calibrator's clean model learns from wordings side by side."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import DataError
from fusion_detox.training.contrastive.batches import AnchorDraws, encode_sets
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.contrastive.measure import HeldOutAnchors
from fusion_detox.training.contrastive.trainer import ANCHOR_ARGUMENTS, contrastive_trainer
from fusion_detox.training.data.blocks import byte_lengths
from fusion_detox.training.data.pairs import ParaphraseSet
from fusion_detox.training.data.text_blocks import kl_anchor_blocks
from fusion_detox.training.progress import ProgressCallback
from fusion_detox.training.stage import common_arguments, run_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.training.data.corpus import Document
    from fusion_detox.training.run import Run

logger = logging.getLogger(__name__)
_MOST_ANCHORS, _MOST_BLOCKS = 300, 100


@dataclasses.dataclass(frozen=True)
class ContrastText:
    """What the stage learns from: paraphrase sets, and text on which the model is to stay as it is.

    Each without and with what is only measured.
    """

    sets: list[ParaphraseSet]
    held_sets: list[ParaphraseSet]
    kl_anchor_text: list[Document]
    held_kl_anchor_text: list[Document]


class ContrastStage:
    """Trains a clean model by a contrastive objective, against a frozen reference.

    Args:
        run: The training run.
        tokenizer: Of both models.
        bos_id: What a text begins with.
        text: What to learn from.
        contrast: The objective's settings.
        reference: What KL divergence and likelihood ratio are measured against: the difference from
            it is what fusion applies.

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
        self._sets = encode(text.sets)
        if contrast.negatives and not any(one.negatives for one in self._sets):
            raise DataError("no paraphrase set has a negative: give toxic wordings too")
        lm_weight, kl_weight = contrast.anchor_weights(self._objective)
        self._count = config.objective_steps * config.anchors
        blocks = functools.partial(kl_anchor_blocks, tokenizer, bos_id, config=config)
        self._kl_anchor_text = blocks(text.kl_anchor_text, self._count) if kl_weight else None
        if kl_weight and self._kl_anchor_text is None:
            logger.warning(
                "there is no clean or general text, so nothing keeps the model as it is where "
                "nothing is to be held back: give some with --clean"
            )
        self.weights = {
            "lm_weight": lm_weight,
            "kl_weight": 0.0 if self._kl_anchor_text is None else kl_weight,
        }
        self.measure = HeldOutAnchors(
            encode(text.held_sets[:_MOST_ANCHORS]) if text.held_sets else [],
            blocks(text.held_kl_anchor_text, _MOST_BLOCKS),
            byte_lengths(tokenizer),
            batch=8,
            autocast=config.precision != "float32",
            base=self._reference,
        )

    def __call__(self, model: PreTrainedModel, folder: Path) -> list[dict[str, float | None]]:
        """Trains ``model`` in place and returns its curve; goes on from a checkpoint there."""
        config, run = self._config, self._run
        arguments = {
            **common_arguments(folder, config),
            **ANCHOR_ARGUMENTS,
            "max_steps": config.objective_steps,
            "per_device_train_batch_size": config.anchors // run.world_size,
            "learning_rate": config.objective_learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": min(20, config.objective_steps // 2),
            "weight_decay": 0.0,
            "adam_beta2": 0.95,
            "max_grad_norm": config.max_gradient_norm,
            "logging_steps": 10,
        }
        watch = ProgressCallback(
            self._objective,
            self.measure,
            every=config.evaluate_every,
            shown=("ratio_auc_within", "kl"),
            show=run.show_progress and run.is_main,
            file=folder / "curve.json",
        )
        draws = AnchorDraws(
            self._sets,
            self._count,
            positives=self._contrast.positives,
            negatives=self._contrast.negatives,
            general=self._kl_anchor_text,
            seed=config.seed,
        )
        trainer = contrastive_trainer(
            model,
            arguments,
            draws,
            watch,
            objective=self._objective,
            contrast=self._contrast,
            precision=config.precision,
            pad_id=self._bos_id,
            base=self._reference,
        )
        run_trainer(trainer, watch, folder)
        return watch.curve
