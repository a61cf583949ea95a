"""Fingerprints that tell models apart, and names that do not reveal local paths."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TENSORS = 200
_VALUES = 64


def model_fingerprint(*models: PreTrainedModel | None) -> str:
    """Hash loaded models: 12 hex digits of SHA-256.

    Reads names, shapes, dtypes and 64 evenly spaced values of at most 200 tensors. Training changes
    all weights, so a sample suffices, and a large model need not be read as a whole.
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
                sample = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES]
                digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def folder_fingerprint(
    folder: Path, *, samples: int = 64, size: int = 1 << 14, without: Collection[str] = ()
) -> str:
    """Hash the ``.json`` and ``.safetensors`` files of a model folder: 12 hex digits of SHA-256.

    Args:
        folder: The folder, read with all its subfolders.
        samples: Number of evenly spaced pieces to read of a large weights file.
        size: Bytes per piece.
        without: Names of direct subfolders to leave out.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".safetensors", ".json") or not path.is_file():
            continue
        if path.relative_to(folder).parts[0] in without:
            continue
        length = path.stat().st_size
        whole = path.suffix == ".json" or length <= samples * size
        digest.update(f"{path.relative_to(folder).as_posix()}:{length}:".encode())
        with path.open("rb") as file:
            for piece in range(1 if whole else samples):
                file.seek(piece * (length - size) // (samples - 1))
                digest.update(file.read(-1 if whole else size))
    return digest.hexdigest()[:12]


def short_name(name: str | None) -> str:
    """Return a hub id, or a folder's name without its path.

    A folder that is called ``model`` also gets its parent's name.
    """
    path = Path(name or "unnamed").expanduser()
    if not path.is_dir():
        return str(name or "unnamed")
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name
