"""Direct preference optimisation (DPO) on paraphrase sets, with ``trl``."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import DataError, TrainingError
from fusion_detox.training.contrastive.batches import cycle
from fusion_detox.training.data.pairs import ParaphraseSet
from fusion_detox.training.finetuning.config import FinetuneConfig
from fusion_detox.training.progress import ProgressCallback

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def preference_rows(
    sets: Sequence[ParaphraseSet], *, per_anchor: int, seed: int, before: str = ""
) -> list[dict[str, str]]:
    """Pair each positive (chosen) with each negative (rejected), up to a limit per anchor.

    Args:
        sets: The anchors.
        per_anchor: Maximum pairs per anchor; if there are more, this many are drawn.
        seed: Seed of the draws.
        before: Text put before each prompt, such as a BOS that the tokenizer does not add.

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
        raise DataError("no paraphrase set has a negative, so DPO has no pairs: add toxic wordings")
    return rows


def dpo_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: LoraConfig,
    arguments: dict[str, Any],
    progress: ProgressCallback,
    *,
    rows: Sequence[dict[str, str]],
    config: FinetuneConfig,
) -> Any:
    """Make a ``trl.DPOTrainer`` (Rafailov et al. 2023, arXiv 2305.18290) of an adapter.

    The reference is the model without its adapter. trl adds EOS to the end of each text.

    Raises:
        TrainingError: The tokenizer has no EOS token.
        DataError: Too few pairs to fill a batch fit into the context.
    """
    import datasets
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]  # lazy export

    if tokenizer.eos_token is None:
        raise TrainingError(
            "dpo needs a tokenizer with an EOS token, and this one has none: choose another "
            "--objective"
        )
    count = arguments["max_steps"] * config.batch_size
    order = [rows[i] for i in cycle(random.Random(f"order {config.seed}"), len(rows), count)]
    # trl enables checkpointing by default; transformers 5 renamed the setting.
    known = {field.name for field in dataclasses.fields(DPOConfig)}
    renamed = "activation_checkpointing"
    checkpointing = renamed if renamed in known else "gradient_checkpointing"
    settings = DPOConfig(
        **{**arguments, checkpointing: False},
        beta=config.dpo_beta,
        max_length=config.context_length,
        bf16=config.precision == "bfloat16",
    )
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        trainer: Any = DPOTrainer(
            model=model,
            args=settings,
            train_dataset=datasets.Dataset.from_list(order),
            # trl sets a padding token on it.
            processing_class=copy.deepcopy(tokenizer),
            peft_config=adapter,
            callbacks=[progress],
        )
    finally:
        if bars:
            datasets.enable_progress_bars()
    fitting = len(trainer.train_dataset)
    if fitting < config.batch_size:
        raise DataError(
            f"only {fitting} of {len(order)} pairs and their prompts fit into the context of "
            f"{config.context_length} tokens: raise --context-length"
        )
    return trainer


def bos_before(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of the BOS token, or an empty string if the tokenizer adds BOS by itself."""
    text = tokenizer.bos_token or tokenizer.eos_token or ""
    first = tokenizer("a")["input_ids"][:1]
    return "" if first == [tokenizer.convert_tokens_to_ids(text)] else str(text)
