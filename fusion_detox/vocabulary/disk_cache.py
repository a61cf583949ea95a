"""Vocabulary maps on disk: one safetensors file per pair of vocabularies, named by its key."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusion_detox.files.atomic import replacing_file
from fusion_detox.files.cache_root import cache_root

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


def cache_folder(cache_dir: Path | None = None) -> Path:
    """The cache folder: the argument, else ``$FUSION_DETOX_CACHE``, else the user's cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    # In a folder that the user names, maps lie at the top.
    return cache_root() if os.environ.get("FUSION_DETOX_CACHE") else cache_root() / "maps"


def load_map(path: Path) -> tuple[dict[str, Tensor], float] | None:
    """A map's tensors and coverage, or ``None`` if there is no usable file.

    A truncated, damaged or foreign file is reported in the log and then ignored.
    """
    try:
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"fusion-detox-map-{FORMAT_VERSION}":
                raise ValueError("it is not a vocabulary map of this version")
            if metadata.get("key") != path.stem:
                raise ValueError("it belongs to another pair of vocabularies")
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        _check(tensors, json.loads(metadata["sizes"]))
        return tensors, float(metadata["coverage"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning("the cached vocabulary map %s is rebuilt: %s", path, error)
        return None


def save_map(path: Path, tensors: dict[str, Tensor], coverage: float) -> None:
    """Write a map atomically. A failure is only logged."""
    metadata = {
        "format": f"fusion-detox-map-{FORMAT_VERSION}",
        "key": path.stem,
        "coverage": repr(coverage),
        "sizes": json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()}),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "the vocabulary map cannot be cached in %s (%s), so every process builds it again; set "
            "FUSION_DETOX_CACHE to a writable folder",
            path.parent,
            error,
        )


def _check(tensors: dict[str, Tensor], sizes: dict[str, list[int]]) -> None:
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != sizes:
        raise ValueError("its tensors do not have the recorded shapes")
    for name in ("prefix", "transfer", "split"):
        pointers = tensors[f"{name}_ptr"]
        if pointers[0] != 0 or pointers[-1] != len(tensors[f"{name}_ids"]):
            raise ValueError(f"its {name} rows are inconsistent")
