"""The base model of ``finetune``, its LoRA adapter, and the adapter's folder."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fusion_detox.errors import ConfigError, DataFileError, MissingExtraError, TrainingError
from fusion_detox.files.adapters import ADAPTER_CONFIG, refuse_adapter
from fusion_detox.files.atomic import replacing_folder
from fusion_detox.files.loading_errors import explained
from fusion_detox.files.models import (
    check_causal,
    load_target,
    load_tokenizer,
    locate,
    quiet_transformers,
)
from fusion_detox.files.portable import make_portable
from fusion_detox.training.finetuning.card import render_adapter_card
from fusion_detox.training.finetuning.config import FinetuneConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_output(output: Path) -> None:
    """Allow replacing only an adapter or an empty folder.

    Raises:
        TrainingError: ``output`` is something else.
    """
    if not output.exists():
        return
    if not (output / ADAPTER_CONFIG).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise TrainingError(
            f"{output} exists and is not an adapter, so it is not replaced: choose another folder"
        )


def load_base_model(
    name_or_path: str,
    *,
    dtype: str | None,
    four_bit: bool,
    revision: str | None,
    local_files_only: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model to fine-tune, with dropout disabled, and its tokenizer.

    Dropout would bias the perplexities that the objectives compare.

    Raises:
        ModelNotFoundError: The model was not found, or the hub cannot be reached.
        ModelError: It is not a causal language model, is an adapter, or is incomplete or damaged.
        MissingExtraError: ``four_bit`` is set and ``bitsandbytes`` is not installed.
        TrainingError: ``four_bit`` is set and there is no CUDA device.
    """
    refuse_adapter(name_or_path, "finetune")
    if four_bit:
        model, tokenizer = _load_four_bit(name_or_path, revision, local_files_only)
    else:
        model, tokenizer = load_target(
            name_or_path,
            dtype=dtype or "float32",
            revision=revision,
            local_files_only=local_files_only,
        )
    _disable_dropout(model)
    model.config.use_cache = False
    return model, tokenizer


def adapter_settings(
    model: PreTrainedModel, config: FinetuneConfig, target_modules: Sequence[str]
) -> LoraConfig:
    """Make the ``LoraConfig`` of an adapter for ``model``.

    Args:
        model: The model to adapt.
        config: Rank, scale and dropout.
        target_modules: Names, or last parts of names, of linear modules. If empty, peft's choice
            for the model family, or all linear layers except the output layer.

    Raises:
        ConfigError: The model has no linear module with one of these names.
    """
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CUSTOMARY

    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name
    }
    wanted = list(target_modules or CUSTOMARY.get(model.config.model_type, ()))
    found = {
        target: [name for name in linear if name == target or name.endswith(f".{target}")]
        for target in wanted
    }
    unknown = [target for target, names in found.items() if not names]
    if unknown and target_modules:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"the model has no linear module named {', '.join(unknown)}; it has {', '.join(ends)}"
        )
    adapted = [linear[name] for names in found.values() for name in names]
    transposed = any(isinstance(module, Conv1D) for module in adapted or linear.values())
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.scale,  # type: ignore[arg-type]  # takes any number
        lora_dropout=config.adapter_dropout,
        target_modules=wanted if adapted and not unknown else "all-linear",
        fan_in_fan_out=transposed,
    )


def check_context(model: PreTrainedModel, context_length: int) -> None:
    """Check that the model has enough positions.

    Raises:
        ConfigError: It has fewer than ``context_length``.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and context_length > limit:
        raise ConfigError(
            f"context_length {context_length} is more than the {limit} positions of the model: "
            f"set --context-length to {limit} or less"
        )


def write_adapter(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    record: dict[str, Any],
    *,
    base: str,
    revision: str | None,
) -> None:
    """Write adapter, tokenizer, training record and card; ``output`` is replaced as a whole.

    Args:
        model: The trained PEFT model.
        tokenizer: The base model's tokenizer.
        output: The folder to write; existing content is replaced.
        record: The training record, JSON-ready.
        base: Path or hub id of the base model, stored in the adapter.
        revision: Revision of the base model.

    Raises:
        DataFileError: Writing failed, for example because the disk is full.
    """
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = base, revision
    try:
        with replacing_folder(output) as folder:
            with quiet_transformers():
                # Otherwise peft asks the hub whether the embeddings changed; they are not trained.
                model.save_pretrained(
                    folder, selected_adapters=["default"], save_embedding_layers=False
                )
                tokenizer.save_pretrained(folder)
            make_portable(folder)
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            for file, content in (
                ("training.json", text),
                ("README.md", render_adapter_card(record)),
            ):
                (folder / file).write_text(content, encoding="utf-8", errors="replace")
            # safetensors files are readable only by their owner unless changed.
            for path in folder.glob("*.safetensors"):
                path.chmod((folder / "README.md").stat().st_mode)
    except OSError as error:
        raise DataFileError(
            f"{output} cannot be written: {error.strerror or error}. The trained model is "
            f"kept in {output.name}.training; free some space, then rerun to resume."
        ) from error


def _disable_dropout(model: torch.nn.Module) -> None:
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
            "four-bit weights need a CUDA device, and this machine has none: omit --four-bit "
            "(--dtype bfloat16 halves the memory on any device)"
        )
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    tokenizer = load_tokenizer(name_or_path, local_files_only=local_files_only, revision=revision)
    source = locate(name_or_path, "model", local_files_only=local_files_only)
    options: dict[str, Any] = {
        "trust_remote_code": False,
        "local_files_only": local_files_only or Path(source).is_dir(),
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
    with explained(source, "model", local_files_only):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=quantised,
            # Each process of a distributed run holds the whole model on its own device.
            device_map={"": int(os.environ.get("LOCAL_RANK", "0"))},
            use_safetensors=True,
            **options,
        )
    prepared: PreTrainedModel = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
        model, use_gradient_checkpointing=False
    )
    return prepared, tokenizer
