"""The model that ``finetune`` starts from, in four bits on request, and its LoRA adapter."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fusion_detox.errors import ConfigError, MissingExtraError, TrainingError
from fusion_detox.files.loading_errors import explained
from fusion_detox.files.models import check_causal, load_target, load_tokenizer
from fusion_detox.training.finetuning.config import FinetuneConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_start(
    name_or_path: str,
    *,
    dtype: str | None,
    four_bit: bool,
    revision: str | None,
    local_files_only: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to fine-tune, without dropout, and its tokenizer.

    Dropout is off because it would bias the perplexities that are compared.

    Raises:
        ModelNotFoundError: Nothing there, or the hub cannot be reached.
        ModelError: It is no causal language model, or is incomplete or damaged.
        MissingExtraError: Four bits are asked for and ``bitsandbytes`` is not installed.
        TrainingError: Four bits are asked for without a CUDA device.
    """
    if four_bit:
        model, tokenizer = _load_four_bit(name_or_path, revision, local_files_only)
    else:
        model, tokenizer = load_target(
            name_or_path,
            dtype=dtype or "float32",
            revision=revision,
            local_files_only=local_files_only,
        )
    _switch_dropout_off(model)
    model.config.use_cache = False
    return model, tokenizer


def adapter_settings(
    model: PreTrainedModel, config: FinetuneConfig, target_modules: Sequence[str]
) -> LoraConfig:
    """The adapter's settings: which modules it changes, and by how much at most.

    Args:
        model: The model to be adapted.
        config: Rank, scale and dropout.
        target_modules: Names, or ends of names, of linear modules; where empty, peft's own choice
            for the family, or else all linear layers but the output layer.

    Raises:
        ConfigError: The model has no linear module of such a name.
    """
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CUSTOMARY

    linear = {name: module for name, module in model.named_modules() if _is_linear(module) and name}
    known = model.config.model_type in CUSTOMARY
    wanted = list(target_modules or (CUSTOMARY[model.config.model_type] if known else ()))
    hit = {
        target: [name for name in linear if name == target or name.endswith(f".{target}")]
        for target in wanted
    }
    unknown = [target for target, names in hit.items() if not names]
    if unknown and target_modules:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"the model has no linear module named {', '.join(unknown)}; it has {', '.join(ends)}"
        )
    adapted = [linear[name] for names in hit.values() for name in names]
    transposed = any(isinstance(module, Conv1D) for module in adapted or linear.values())
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.scale,  # type: ignore[arg-type]  # any number, though it says int
        lora_dropout=config.adapter_dropout,
        target_modules=wanted if adapted and not unknown else "all-linear",
        fan_in_fan_out=transposed,
    )


def check_context(model: PreTrainedModel, context_length: int) -> None:
    """Checks that the model has positions for that many tokens.

    Raises:
        ConfigError: It has fewer.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and context_length > most:
        raise ConfigError(
            f"context_length {context_length} is more than the {most} positions of the model; "
            f"give --context-length {most} or less"
        )


@contextlib.contextmanager
def peft_of_its_time() -> Iterator[None]:
    """Without the warning that peft asks a model for a property by its name of transformers 4."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
        )
        yield


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def _switch_dropout_off(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _load_four_bit(
    name_or_path: str, revision: str | None, local_files_only: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "four-bit")
    if not torch.cuda.is_available():
        raise TrainingError(
            "four-bit weights need a CUDA device, and this machine has none: leave --four-bit out "
            "(--dtype bfloat16 halves the memory anywhere)"
        )
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    tokenizer = load_tokenizer(name_or_path, local_files_only=local_files_only, revision=revision)
    path = Path(name_or_path).expanduser()
    source = str(path) if path.is_dir() else name_or_path
    options: dict[str, Any] = {
        "trust_remote_code": False,
        "local_files_only": local_files_only or path.is_dir(),
        "revision": revision or "main",
    }
    with explained(source, "model", local_files_only):
        settings = AutoConfig.from_pretrained(source, **options)
    check_causal(settings, source)
    quantised: Any = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # Each process of a distributed run holds the whole model on its own device.
    device = int(os.environ.get("LOCAL_RANK", "0"))
    with explained(source, "model", local_files_only):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=quantised,
            device_map={"": device},
            use_safetensors=True,
            **options,
        )
    prepared: PreTrainedModel = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
        model, use_gradient_checkpointing=False
    )
    return prepared, tokenizer
