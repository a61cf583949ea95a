"""What a model's output layer is given: its last hidden states, whatever the family."""

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
    """The layer that makes logits of hidden states.

    Raises:
        ModelError: The model names none.
    """
    untyped: Any = model
    layer = untyped.get_output_embeddings()
    if layer is None:
        raise ModelError(
            f"{type(model).__name__} names no output embeddings, so that its last hidden states "
            "cannot be fused: use another rule, such as contrast"
        )
    found: torch.nn.Module = layer
    return found


@contextlib.contextmanager
def head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what the output layer is given in the block, by the thread that entered it.

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
