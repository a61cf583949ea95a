"""Tells one model from another, and names it without saying where on the machine it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VALUES = 64
_TENSORS = 200


def model_fingerprint(*models: PreTrainedModel | None) -> str:
    """12 hex digits of SHA-256 over the weights of models, as they are loaded.

    Of each of up to 200 tensors, names, shapes, dtypes and 64 values spread over it are read:
    training moves all weights, so that these tell two models apart, and a large model is not
    read whole.
    """
    digest = hashlib.sha256()
    for model in models:
        if model is None:
            continue
        tensors = sorted(model.state_dict().items())
        step = max(1, len(tensors) // _TENSORS)
        for name, tensor in tensors[::step]:
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
            flat = tensor.detach().reshape(-1)
            if flat.numel() and flat.is_floating_point():
                spread = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES]
                digest.update(spread.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def short_name(name: str | None) -> str:
    """A folder's own name, not where it lies (with its parent's if it says nothing); a hub id."""
    path = Path(name or "unnamed").expanduser()
    if not path.is_dir():
        return str(name or "unnamed")
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name
