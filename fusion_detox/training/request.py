"""What ``train_calibrator`` may be asked for, checked before any work is done."""

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
    """Whether the objective is a contrastive one; refuses pairs without one and the reverse."""
    contrastive = config.objective != "language-modelling"
    if contrastive and not pairs:
        raise TrainingError(
            f"the objective {config.objective} learns from paraphrase sets: give some with --pairs"
        )
    if config.objective != "language-modelling":
        contrast.check_teaches(config.objective)
    if pairs and not contrastive:
        raise TrainingError(
            "paraphrase sets are given, but the objective is language-modelling, which has no use "
            "for them: choose another with --objective, such as likelihood-ratio"
        )
    return contrastive


def check_continuation(
    contrastive: bool, general: Sources, reference_data: Sources, base: Any, tokenizer: Any
) -> None:
    """Refuses what does not go with a calibrator to go on from."""
    if not contrastive:
        raise TrainingError(
            "a calibrator is gone on from by a contrastive objective only: choose one with "
            "--objective, such as likelihood-ratio"
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
            f"a calibrator brings its own models and tokenizer, so {', '.join(useless)} cannot be "
            "given with it; text that is to stay as it is goes to --clean"
        )


def reference_needed(calibrator: Calibrator) -> PreTrainedModel:
    """The calibrator's reference."""
    if calibrator.reference is None:
        raise TrainingError(
            f"{calibrator.name} has no reference, from which the clean model is to differ: give a "
            "calibrator with both models"
        )
    return calibrator.reference


def check_uses(has_clean: bool, where: Sequence[str], reference_data: Sources) -> None:
    """Refuses what would be read for nothing."""
    if where and not has_clean:
        raise TrainingError(
            f"the condition {where[0]} picks from nothing: give text with --clean or --general"
        )
    if reference_data and not has_clean:
        raise TrainingError(
            "reference data train a reference beside a clean model, and there is no clean text: "
            "give some with --clean, or leave --reference-data out"
        )


def check_request(has_clean: bool, general: Sources, base: Any, tokenizer: Any) -> None:
    """Refuses a training without text to learn from."""
    if not has_clean:
        raise TrainingError(
            "there is no clean text: give some, or general text and a condition that picks the "
            "clean part of it, such as toxic=false"
        )
    if base is None and not general:
        raise TrainingError("without a base model, general text is needed to train one from")
    if base is not None and tokenizer is not None:
        raise TrainingError("a base model brings its own tokenizer: give one or the other")


def check_texts(texts: dict[str, list[Document]]) -> None:
    """Refuses general text that holds nothing but clean text."""
    general = {d.key for d in texts["general"]}
    clean = {d.key for d in texts["clean"]}
    if general and general <= clean and not texts["reference_data"]:
        raise DataError(
            f"all {len(general)} general documents are clean documents too, so the two models "
            "would learn the same: general text must also hold what is to be held back"
        )


def inherited(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a calibrator tells about one that training goes on from it.

    What was measured of the earlier one does not hold for the later.
    """
    facts = {name: record[name] for name in _FACTS if name in record}
    earlier = {name: value for name, value in record.items() if name not in _MEASURED}
    return {**facts, "continued_from": earlier}
