"""Check the arguments of ``train_calibrator`` before training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.errors import DataError, TrainingError
from fusion_detox.training.config import TrainingConfig
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.data.corpus import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sources = Sequence[str | Path]
_FACTS = ("language", "license", "data", "clean_text")
_MEASURED = ("evaluation", "tuning")


def check_objective(config: TrainingConfig, contrast: ContrastiveConfig, pairs: Sources) -> bool:
    """Return whether the objective is contrastive; it must be if and only if there are pairs."""
    if config.objective == "language-modelling":
        if pairs:
            raise TrainingError(
                "paraphrase sets were given, but the objective language-modelling does not use "
                "them: choose another --objective, such as likelihood-ratio"
            )
        return False
    if not pairs:
        raise TrainingError(
            f"the objective {config.objective} learns from paraphrase sets: give some with --pairs"
        )
    contrast.check_teaches(config.objective)
    return True


def check_sources(
    *,
    general: Sources,
    reference_data: Sources,
    base: str | Path | None,
    tokenizer: str | Path | None,
    conditions: Sequence[str],
    has_clean: bool,
    contrastive: bool,
    continues: bool,
) -> None:
    """Refuse missing, useless or contradictory sources.

    ``continues`` tells whether training continues from a calibrator.
    """
    if continues:
        if not contrastive:
            raise TrainingError(
                "--calibrator requires a contrastive --objective, such as likelihood-ratio"
            )
        given = {
            "--general": general,
            "--reference-data": reference_data,
            "--base or --init-from": base,
            "--tokenizer": tokenizer,
        }
        useless = [name for name, value in given.items() if value]
        if useless:
            raise TrainingError(
                f"a calibrator has its own models and tokenizer, so {', '.join(useless)} cannot be "
                "used with it; use --clean for text on which the model must not change"
            )
    else:
        if not has_clean and not contrastive:
            raise TrainingError(
                "there is no clean text: give some with --clean, or general text and a condition "
                "that selects its clean part, such as toxic=false"
            )
        if base is None and not general:
            raise TrainingError(
                "without a base model, general text is needed to train one: give some with "
                "--general, or a model with --base"
            )
        if base is not None and tokenizer is not None:
            raise TrainingError("a base model has its own tokenizer: give only one of the two")
    if conditions and not has_clean:
        raise TrainingError(
            f"the condition {conditions[0]} has no rows to select from: give text with --clean or "
            "--general"
        )
    if reference_data and not has_clean:
        raise TrainingError(
            "reference data trains a reference beside a clean model, but there is no clean text: "
            "give some with --clean, or remove --reference-data"
        )


def check_texts(texts: Mapping[str, Sequence[Document]]) -> None:
    """Refuse general text that contains nothing but clean text."""
    general = {d.key for d in texts["general"]}
    clean = {d.key for d in texts["clean"]}
    if general and general <= clean and not texts["reference_data"]:
        raise DataError(
            f"all {len(general)} general documents are clean documents too, so both models would "
            "learn the same: add toxic text to the general text"
        )


def reference_needed(calibrator: Calibrator) -> PreTrainedModel:
    """Return the calibrator's reference, or raise ``TrainingError`` if it has none."""
    if calibrator.reference is None:
        raise TrainingError(
            f"{calibrator.name} has no reference for the clean model to differ from: give a "
            "calibrator with both models"
        )
    return calibrator.reference


def inherited(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that a calibrator inherits from the record of the one it continues from.

    Measurements of the earlier calibrator do not apply to the later one.
    """
    facts = {name: record[name] for name in _FACTS if name in record}
    earlier = {name: value for name, value in record.items() if name not in _MEASURED}
    return {**facts, "continued_from": earlier}
