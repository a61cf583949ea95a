"""LoRA adapters in peft's format: a folder that names a base model, and what to add to it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file

from fusion_detox.errors import MissingExtraError, ModelError, ModelNotFoundError
from fusion_detox.files.loading_errors import LOADING_ERRORS, describe, explained, first_line
from fusion_detox.files.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_MERGE = "Merge it into its model with peft (merge_and_unload), then give the merged model"


class Adapter(NamedTuple):
    """An adapter's folder.

    Attributes:
        folder: The folder.
        base: Folder or hub id of the model to which the adapter belongs.
        revision: Revision of the base model, if its configuration names one.
    """

    folder: Path
    base: str
    revision: str | None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer of its own."""
        return any((self.folder / name).is_file() for name in _TOKENIZER_FILES)

    def wrong_base(self) -> str:
        """What to do if the base model is not the right one."""
        return (
            "Give the model that the adapter was trained on as base_model_name_or_path in "
            f"{self.folder / ADAPTER_CONFIG}."
        )


def find_adapter(name_or_path: str | os.PathLike[str]) -> Adapter | None:
    """The adapter in a folder; ``None`` if this is not the folder of an adapter.

    Raises:
        ModelError: The folder's ``adapter_config.json`` is damaged, or is not a LoRA adapter's.
    """
    folder = Path(name_or_path).expanduser()
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        values = read_json(path, finite=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read: {first_line(error)}. Copy the adapter's folder again."
        ) from error
    found = values if isinstance(values, dict) else {}
    base, revision, kind = (
        found.get(name) for name in ("base_model_name_or_path", "revision", "peft_type")
    )
    if kind != "LORA":
        raise ModelError(
            f"{path}: the peft_type is {kind!r}, but only LORA adapters are loaded. {_MERGE}."
        )
    if found.get("megatron_config") is not None:
        # peft would import the module that megatron_core names.
        raise ModelError(f"{path}: adapters of Megatron models are not loaded. {_MERGE}.")
    if not isinstance(base, str) or not base.isprintable() or not base:
        raise ModelError(
            f"{path}: base_model_name_or_path is {base!r}, so the model that the adapter belongs "
            "to is not known. Give its folder or hub id there."
        )
    return Adapter(folder, base, revision if isinstance(revision, str) else None)


@contextlib.contextmanager
def explained_base(adapter: Adapter) -> Iterator[None]:
    """Say to which adapter a base model belongs that the block does not find.

    Raises:
        ModelNotFoundError: The block raised it.
    """
    try:
        yield
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{adapter.folder} is an adapter of {adapter.base!r}, which cannot be loaded. {error} "
            f"{adapter.wrong_base()}"
        ) from error


def load_adapted(adapter: Adapter, load_base: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Load an adapter's base model with the adapter in it, not merged, as peft does.

    Raises:
        MissingExtraError: ``peft`` is not installed.
        ModelError: The adapter's weights are pickled, missing, damaged or not finite, or they do
            not fit the base model.
    """
    try:
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise MissingExtraError("peft", "finetune") from error

    path = adapter.folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = sorted(adapter.folder.glob("adapter_model.*"))
        if pickled:
            raise ModelError(
                f"{adapter.folder} holds {pickled[0].name} but no {ADAPTER_WEIGHTS}. Pickled "
                "weights are not read, because opening them can run code. Where you trust them, "
                "load the adapter with peft, then write it again with save_pretrained."
            )
        raise ModelError(f"{path} is missing. Copy the adapter's folder again.")
    with explained(str(adapter.folder), "adapter", True):
        weights = load_file(path)
        config = PeftConfig.from_pretrained(str(adapter.folder))
    damaged = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise ModelError(
            f"{path}: {describe(damaged)} holds values that are not finite. Training diverged or "
            "the file is damaged; copy it again, or train the adapter again."
        )
    config.inference_mode = True
    model = load_base()
    try:
        with peft_warning_ignored():
            wrapped: Any = PeftModel(model, config)
            result: Any = set_peft_model_state_dict(wrapped, weights)
    except LOADING_ERRORS as error:
        raise _misfit(adapter, first_line(error)) from error
    own = ("lora_", "modules_to_save.")
    missing = [key for key in result.missing_keys if any(part in key for part in own)]
    if missing:
        raise _misfit(adapter, f"{path.name} lacks {describe(missing)}")
    if result.unexpected_keys:
        raise _misfit(adapter, f"the model has no place for {describe(result.unexpected_keys)}")
    adapted: PreTrainedModel = wrapped.get_base_model().eval()
    return adapted


def refuse_adapter(name_or_path: str | os.PathLike[str], what: str) -> None:
    """Raise ``ModelError`` for an adapter's folder where a whole model is required."""
    if find_adapter(name_or_path) is not None:
        raise ModelError(f"{name_or_path} is an adapter, but {what} needs a whole model. {_MERGE}.")


@contextlib.contextmanager
def peft_warning_ignored() -> Iterator[None]:
    """Ignore the warning that peft reads a property under its transformers 4 name."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
        )
        yield


def _misfit(adapter: Adapter, reason: str) -> ModelError:
    return ModelError(
        f"the adapter {adapter.folder} does not fit its base model {adapter.base!r}: {reason}. "
        + adapter.wrong_base()
    )
