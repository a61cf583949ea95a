"""One tensor out of a model's safetensors files, downloading no more than the file it is in."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusion_detox.errors import AlignmentError, ModelError
from fusion_detox.files.loading_errors import first_line
from fusion_detox.files.models import download

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MOST_LISTED = 6


def read_tensor(
    source: str,
    names: list[str],
    shape: tuple[int, int],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Tensor:
    """The first of some tensors that is there.

    Where none has one of the names, the tensor of the right shape whose name ends alike is taken,
    if there is just one.

    Args:
        source: A folder or a hub id.
        names: What it may be called, the likeliest first.
        shape: What it must have.
        revision: Of a hub repository.
        local_files_only: Never contact the hub.

    Raises:
        AlignmentError: There is no such tensor, or it is not stored as plain numbers.
        ModelError: The files are missing or damaged.
        ModelNotFoundError: The hub has no such repository or cannot be reached.
    """

    def folder_with(file: str) -> Path:
        if Path(source).is_dir():
            return Path(source)
        return download(source, [file], revision=revision, local_files_only=local_files_only)

    files = _files(folder_with(_INDEX))
    if files is None:
        folder = folder_with(_SINGLE)
        if not (folder / _SINGLE).is_file():
            raise ModelError(
                f"{source} holds neither {_INDEX} nor {_SINGLE}. Only safetensors are read; save "
                "the model once, where you trust it, with save_pretrained"
            )
        files = dict.fromkeys(_shapes(folder / _SINGLE), _SINGLE)
    chosen = next((name for name in names if name in files), None)
    chosen = chosen or _alike(files, names)
    if chosen is None:
        likely = [name for name in files if name.endswith("weight")]
        shown = sorted(likely, key=lambda name: (_likeness(name), name))[:_MOST_LISTED]
        raise AlignmentError(
            f"{source} holds no tensor {' or '.join(names[:2])}, of which the embeddings would be "
            f"read; it holds {len(files)} tensors, such as {', '.join(shown) or 'none'}. Give a "
            "complete model, or load it and pass the model itself"
        )
    file = folder_with(files[chosen]) / files[chosen]
    found = _shapes(file).get(chosen)
    if found is None:
        raise ModelError(f"{file} lacks the tensor {chosen}, which its index says it holds")
    if found != list(shape):
        raise AlignmentError(
            f"{source}: the tensor {chosen} has the shape {found}, but the configuration asks for "
            f"{list(shape)}; its files do not belong together"
        )
    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(chosen)
    if not tensor.is_floating_point():
        raise AlignmentError(
            f"{source}: the tensor {chosen} is stored as {tensor.dtype}, as of a quantised model; "
            "align with the model that was quantised"
        )
    return tensor


def _files(folder: Path) -> dict[str, str] | None:
    """The file of each tensor by the index; ``None`` where there is no index."""
    path = folder / _INDEX
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {first_line(error)}") from error
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise ModelError(f"{path} points outside its folder: {outside[0]!r}")
    return files


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            return {name: list(tensors.get_slice(name).get_shape()) for name in names}
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing, though the index names it") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is truncated or no safetensors file: {first_line(error)}"
        ) from error


def _alike(files: dict[str, str], names: list[str]) -> str | None:
    """The one tensor whose last parts are those of a name: checkpoints have other prefixes."""
    for name in names:
        end = "." + ".".join(name.split(".")[-2:])
        found = [candidate for candidate in files if f".{candidate}".endswith(end)]
        if len(found) == 1:
            return found[0]
    return None


def _likeness(name: str) -> int:
    """Smaller for what looks like an embedding."""
    words = ("embed", "wte", "head", "output")
    return next((index for index, word in enumerate(words) if word in name), len(words))
