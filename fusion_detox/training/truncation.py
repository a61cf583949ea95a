"""Cut a model to its first layers, with its embeddings, final norm and head.

The calibration model of arXiv 2506.01266 consists of the first three layers of a Llama model with
7 billion parameters and is trained further.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from fusion_detox.errors import ModelError, TrainingError
from fusion_detox.files.loading_errors import LOADING_ERRORS, describe, explained, first_line
from fusion_detox.files.models import check_causal, locate

_PAPERS_LAYERS = 3
_COUNT = "num_hidden_layers"


def truncate(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Copy a model with its first layers only.

    Args:
        model: A causal language model whose configuration states its number of layers.
        layers: Number of layers to keep.

    Returns:
        A new model of the same class and dtype, with weights of its own.

    Raises:
        TrainingError: ``layers`` is below 1 or more than the model has.
        ModelError: The model does not state its number of layers, or cannot be built with fewer.
    """
    name = model.config.name_or_path or type(model).__name__
    count = _check_count(model.config, name, layers)
    try:
        settings = _shortened(model.config, count, layers)
        untyped: Any = type(model)
        small: Any = untyped(settings)
        own, needed = model.state_dict(), small.state_dict()
        missing = set(needed) - set(own)
        if not missing:
            small = small.to(model.dtype)
            small.load_state_dict({key: own[key].clone() for key in needed})
    except LOADING_ERRORS as error:
        raise ModelError(
            f"{name} ({model.config.model_type}) cannot be cut to {layers} layers: "
            f"{first_line(error)}. Give the whole model as --base, or choose another one"
        ) from error
    if missing:
        raise ModelError(
            f"{name} ({model.config.model_type}) cannot be cut to {layers} layers: it lacks "
            f"{describe(missing)}. Give the whole model as --base, or choose another one"
        )
    small.generation_config = copy.deepcopy(model.generation_config)
    truncated: PreTrainedModel = small.eval()
    return truncated


def base_and_layers(
    base: str | Path | None, init_from: str | Path | None, layers: int | None
) -> tuple[str | Path | None, int | None]:
    """Check which model to start from, and how many layers to keep, before training starts.

    Args:
        base: A model to use as a whole, by folder or hub id.
        init_from: A model to truncate.
        layers: Number of layers to keep of ``init_from``; by default 3, as in the paper.

    Returns:
        The model, if any, and the number of layers to keep, ``None`` for all.

    Raises:
        TrainingError: The arguments exclude each other, or the model has fewer layers.
        ModelError: It is not a causal language model, or does not state its number of layers.
        ModelNotFoundError: The model does not exist.
    """
    if init_from is None:
        if layers is not None:
            raise TrainingError(
                f"keep_layers is {layers}, but no model is given to take layers from: give it as "
                "init_from (--init-from)"
            )
        return base, None
    if base is not None:
        raise TrainingError(
            f"base {str(base)!r} and init_from {str(init_from)!r} exclude each other: the first "
            "starts from a whole model, the second from its first layers; give one of them"
        )
    layers = _PAPERS_LAYERS if layers is None else layers
    source = locate(str(init_from), "model")
    with explained(source, "model", local_files_only=False):
        settings = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_causal(settings, source)
    _check_count(settings, source, layers)
    return init_from, layers


def _check_count(config: PretrainedConfig, name: str, layers: int) -> int:
    """Return the model's number of layers, after checking that there are enough."""
    count = getattr(config.get_text_config(), _COUNT, None)
    if not isinstance(count, int):
        raise ModelError(
            f"{name} ({config.model_type}) does not state its number of layers, so it cannot be "
            "truncated: give the whole model as --base, or choose another one"
        )
    if not 1 <= layers <= count:
        raise TrainingError(
            f"keep_layers must be at least 1 and at most {count}, the number of layers of {name}, "
            f"but is {layers}"
        )
    return count


def _shortened(config: PretrainedConfig, count: int, layers: int) -> PretrainedConfig:
    """The configuration for fewer layers: their number, and lists with one entry per layer."""
    whole = copy.deepcopy(config)
    settings: Any = whole.get_text_config()
    lists = {
        name: value[:layers]
        for name, value in settings.to_dict().items()
        if isinstance(value, list) and len(value) == count and "layer" in name
    }
    if hasattr(settings, "attention_types"):  # GPT-Neo derives attention_layers from it
        lists["attention_types"] = [[settings.attention_layers[:layers], 1]]
        lists["attention_layers"] = settings.attention_layers[:layers]
    for name, value in lists.items():
        setattr(settings, name, value)
    setattr(settings, _COUNT, layers)
    return whole
