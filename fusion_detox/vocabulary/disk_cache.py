"""Vocabulary maps on disk: one safetensors file per pair of vocabularies, named by its key.

A map decides which memory a projection reads, so only a whole, unchanged file of this user is used.
Its metadata hold its key and the SHA-256 of its content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from fusion_detox.files.atomic import recover, replacing_file
from fusion_detox.files.cache_root import cache_root

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2

_DTYPES = {"ptr": torch.int32, "ids": torch.int32, "values": torch.float32}
_NAMES = {
    *(f"{mode}_{part}" for mode in ("prefix", "transfer") for part in _DTYPES),
    *("split_ptr", "split_ids"),
}
_ROUNDING = 1e-3


def cache_folder(cache_dir: Path | None = None) -> Path:
    """The cache folder: the argument, else ``$FUSION_DETOX_CACHE``, else the user's cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    # In a folder that the user names, maps lie at the top.
    return cache_root() if os.environ.get("FUSION_DETOX_CACHE") else cache_root() / "maps"


def usable_folder(folder: Path) -> bool:
    """Whether maps may be read from and written to a folder; if not, the log says why."""
    try:
        _check_owner(folder.stat())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning(
            "the cache folder %s is not used: %s. Set FUSION_DETOX_CACHE to a folder of your own, "
            "or run: chmod go-w %s",
            folder,
            error,
            folder,
        )
        return False
    return True


def load_map(path: Path, rows: int, columns: int) -> tuple[dict[str, Tensor], float] | None:
    """A map's tensors and coverage, or ``None`` if there is no usable file.

    A damaged or foreign file, or one that others may write, is reported in the log and ignored.

    Args:
        path: The file, which is named after its key.
        rows: Number of target tokens.
        columns: Number of calibrator tokens.
    """
    try:
        data = _read_own(path)
        recover(path)
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        if metadata.get("format") != f"fusion-detox-map-{FORMAT_VERSION}":
            raise ValueError("it is not a vocabulary map of this version")
        if metadata.get("key") != path.stem:
            raise ValueError("it belongs to another pair of vocabularies")
        coverage = float(metadata["coverage"])
        if metadata.get("sha256") != _digest(path.stem, tensors, coverage):
            raise ValueError("its content does not match its digest")
        _check(tensors, rows, columns)
        if not 0.0 <= coverage <= 1.0:
            raise ValueError(f"its coverage is {coverage}")
        return tensors, coverage
    except FileNotFoundError:
        return None
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, MemoryError),
        SafetensorError,
    ) as error:
        logger.warning("the cached vocabulary map %s is rebuilt: %s", path, error)
        return None


def save_map(path: Path, tensors: dict[str, Tensor], coverage: float) -> None:
    """Write a map atomically, for this user only. A failure is only logged."""
    metadata = {
        "format": f"fusion-detox-map-{FORMAT_VERSION}",
        "key": path.stem,
        "coverage": repr(coverage),
        "sha256": _digest(path.stem, tensors, coverage),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing_file(path) as temporary:
            save_file(tensors, temporary, metadata)
            temporary.chmod(0o600)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "the vocabulary map cannot be cached in %s (%s), so every process builds it again; set "
            "FUSION_DETOX_CACHE to a writable folder",
            path.parent,
            error,
        )


def _read_own(path: Path) -> bytes:
    """The content of a regular file that only this user, or the administrator, can write."""
    # Without O_NONBLOCK, opening a named pipe waits for a writer.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        _check_owner(status)
        return stream.read()


def _check_owner(status: os.stat_result) -> None:
    if not hasattr(os, "getuid"):  # Windows
        return
    if status.st_uid not in (os.getuid(), 0):
        raise ValueError(f"it belongs to another user (uid {status.st_uid})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"other users may write it (mode {stat.S_IMODE(status.st_mode):o})")


def _digest(key: str, tensors: dict[str, Tensor], coverage: float) -> str:
    digest = hashlib.sha256(f"{key} {coverage!r}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _check(tensors: dict[str, Tensor], rows: int, columns: int) -> None:
    """Refuse a map with an index or a value out of range."""
    if tensors.keys() != _NAMES:
        raise ValueError(f"it holds the tensors {', '.join(sorted(tensors)) or 'of no map'}")
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or tensor.dtype != _DTYPES[name.rpartition("_")[2]]:
            raise ValueError(f"{name} has the type {tensor.dtype} and {tensor.dim()} dimensions")
    sizes = {"prefix": (rows, columns), "transfer": (rows, columns), "split": (columns, rows)}
    for name, (length, limit) in sizes.items():
        pointers, ids = tensors[f"{name}_ptr"], tensors[f"{name}_ids"]
        if (
            len(pointers) != length + 1
            or int(pointers[0]) != 0
            or int(pointers[-1]) != len(ids)
            or bool((pointers.diff() < 0).any())
        ):
            raise ValueError(f"its {name} rows are inconsistent")
        if bool(((ids < 0) | (ids >= limit)).any()):
            raise ValueError(f"its {name} ids are not all below {limit}")
    for mode in ("prefix", "transfer"):
        values = tensors[f"{mode}_values"]
        in_range = (values >= 0) & (values <= 1 + _ROUNDING)  # false for nan
        if len(values) != len(tensors[f"{mode}_ids"]) or not bool(in_range.all()):
            raise ValueError(f"its {mode} values are not all probabilities")
    ids, values = tensors["transfer_ids"].long(), tensors["transfer_values"]
    totals = torch.zeros(columns, dtype=torch.float64).index_add_(0, ids, values.double())
    if bool(((totals != 0) & ((totals - 1).abs() > _ROUNDING)).any()):
        raise ValueError("its transfer columns do not sum to 1")
