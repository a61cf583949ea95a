"""On what a run was made: versions and machine."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "sentence-transformers", "detoxify")


def versions() -> dict[str, str]:
    """Versions of everything that decides a number."""
    from fusion_detox import __version__

    found = {"fusion_detox": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: Any) -> dict[str, Any]:
    """Where the target ran, and with how many threads."""
    import torch

    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }
