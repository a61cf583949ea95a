"""Direct preference optimisation on the same paraphrase sets, through ``trl``."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import DataError, MissingExtraError, TrainingError
from fusion_detox.training.data.pairs import ParaphraseSet
from fusion_detox.training.finetuning.config import FinetuneConfig
from fusion_detox.training.finetuning.trainer import training_arguments
from fusion_detox.training.progress import ProgressCallback

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def preference_rows(
    sets: Sequence[ParaphraseSet], *, per_anchor: int, seed: int, before: str = ""
) -> list[dict[str, str]]:
    """Each positive as chosen with each negative as rejected, a few drawn where there are many.

    Args:
        sets: The anchors.
        per_anchor: Pairs of an anchor at most.
        seed: Of the draws.
        before: Put before each prompt, such as a BOS that the tokenizer does not add.

    Raises:
        DataError: No set has a negative.
    """
    rows = []
    for one in sets:
        pairs = [(chosen, rejected) for chosen in one.positives for rejected in one.negatives]
        if len(pairs) > per_anchor:
            pairs = random.Random(f"pairs {seed} {one.key}").sample(pairs, per_anchor)
        rows += [
            {"prompt": before + one.prompt, "chosen": chosen, "rejected": rejected}
            for chosen, rejected in pairs
        ]
    if not rows:
        raise DataError("no paraphrase set has a negative, so there is no pair to prefer one of")
    return rows


def dpo_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: LoraConfig,
    rows: Sequence[dict[str, str]],
    folder: Path,
    config: FinetuneConfig,
    watch: ProgressCallback,
    *,
    steps: int,
    world_size: int,
) -> Any:
    """A ``trl.DPOTrainer`` (Rafailov et al. 2023, arXiv 2305.18290) of an adapter on ``model``.

    The reference is the model without its adapter. A text ends with EOS, as trl adds it.

    Raises:
        MissingExtraError: ``trl`` or ``datasets`` is not installed.
        TrainingError: The tokenizer has no EOS token.
        DataError: No pair fits into the context.
    """
    try:
        import datasets
        from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]  # lazily exported
    except ImportError as error:
        raise MissingExtraError(error.name or "trl", "finetune") from error
    if tokenizer.eos_token is None:
        raise TrainingError("dpo needs a tokenizer with an EOS token, and this one has none")
    order = list(_cycle(random.Random(f"order {config.seed}"), rows, steps * config.batch_size))
    common = training_arguments(folder, config, steps=steps, world_size=world_size)
    # trl switches checkpointing on; transformers 5 renamed it.
    known = {field.name for field in dataclasses.fields(DPOConfig)}
    renamed = "activation_checkpointing"
    common[renamed if renamed in known else "gradient_checkpointing"] = False
    arguments = DPOConfig(
        **common,
        beta=config.dpo_beta,
        max_length=config.context_length,
        bf16=config.precision == "bfloat16",
    )
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        trainer: Any = DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(order),
            # trl sets a padding token of its own.
            processing_class=copy.deepcopy(tokenizer),
            peft_config=adapter,
            callbacks=[watch],
        )
    finally:
        if bars:
            datasets.enable_progress_bars()
    fitting = len(trainer.train_dataset)
    if fitting < config.batch_size:
        raise DataError(
            f"only {fitting} of {len(order)} pairs fit into the context of "
            f"{config.context_length} tokens with their prompt: raise --context-length"
        )
    return trainer


def bos_before(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS token's text where the tokenizer does not add it by itself, else nothing."""
    text = tokenizer.bos_token or tokenizer.eos_token or ""
    first = tokenizer("a")["input_ids"][:1]
    return "" if first == [tokenizer.convert_tokens_to_ids(text)] else str(text)


def _cycle(
    rng: random.Random, rows: Sequence[dict[str, str]], count: int
) -> Iterator[dict[str, str]]:
    while count > 0:
        drawn = rng.sample(list(rows), len(rows))[:count]
        count -= len(drawn)
        yield from drawn
