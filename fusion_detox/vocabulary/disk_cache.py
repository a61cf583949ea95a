"""Vocabulary maps on disk: one safetensors file for each pair of vocabularies."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusion_detox.files.atomic import replacing_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Where maps are kept: the argument, else ``$FUSION_DETOX_CACHE``, else the user's cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    if named := os.environ.get("FUSION_DETOX_CACHE"):
        return Path(named)
    return Path.home() / ".cache" / "fusion-detox" / "maps"


def load_map(path: Path, key: str) -> tuple[dict[str, Tensor], float] | None:
    """A map's tensors and coverage, or ``None`` where there is none that can be used.

    A truncated, damaged or foreign file is reported in the log and counts as none.
    """
    try:
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"fusion-detox-map-{FORMAT_VERSION}":
                raise ValueError("it is not a vocabulary map of this version")
            if metadata.get("key") != key:
                raise ValueError("it belongs to another pair of vocabularies")
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        _check(tensors, json.loads(metadata["sizes"]))
        return tensors, float(metadata["coverage"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning("the cached vocabulary map %s is built anew: %s", path, error)
        return None


def save_map(path: Path, key: str, tensors: dict[str, Tensor], coverage: float) -> None:
    """Writes a map so that no reader ever sees half of it. A failure is only logged."""
    metadata = {
        "format": f"fusion-detox-map-{FORMAT_VERSION}",
        "key": key,
        "coverage": repr(coverage),
        "sizes": json.dumps({name: list(tensor.shape) for name, tensor in tensors.items()}),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "the vocabulary map cannot be kept in %s (%s), so it is built in every process; set "
            "FUSION_DETOX_CACHE to a folder that can be written",
            path.parent,
            error,
        )


def _check(tensors: dict[str, Tensor], sizes: dict[str, list[int]]) -> None:
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != sizes:
        raise ValueError("its tensors are not the ones that were written")
    for name in ("prefix", "transfer", "split"):
        pointers = tensors[f"{name}_ptr"]
        if pointers[0] != 0 or pointers[-1] != len(tensors[f"{name}_ids"]):
            raise ValueError(f"its {name} rows do not fit together")
