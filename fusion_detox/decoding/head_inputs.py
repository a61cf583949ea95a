"""Captures the inputs of a model's output layer: its last hidden states, in any family."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusion_detox.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def output_layer(model: PreTrainedModel) -> torch.nn.Module:
    """The layer that turns hidden states into logits.

    Raises:
        ModelError: The model does not name one.
    """
    untyped: Any = model
    layer = untyped.get_output_embeddings()
    if layer is None:
        raise ModelError(
            f"{type(model).__name__} does not name its output embeddings, so its last hidden "
            "states cannot be fused: use another rule, such as contrast"
        )
    found: torch.nn.Module = layer
    return found


@contextlib.contextmanager
def head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Records the inputs of the output layer while the block runs, for the entering thread only.

    Yields:
        A list to which each call of the layer appends its input, ``(..., width)``.
    """
    seen: list[Tensor] = []
    owner = threading.get_ident()

    def keep(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if threading.get_ident() == owner:
            seen.append(inputs[0])

    handle = output_layer(model).register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
