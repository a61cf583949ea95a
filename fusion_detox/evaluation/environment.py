"""On what a run was made: versions and machine."""

from __future__ import annotations

import platform
from typing import Any

from fusion_detox.files.versions import installed_versions

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "sentence-transformers", "detoxify")


def versions() -> dict[str, str]:
    """Versions of everything that decides a number."""
    from fusion_detox import __version__

    return {"fusion_detox": __version__, **installed_versions(*_PACKAGES)}


def machine(device: Any) -> dict[str, Any]:
    """Where the target ran, and with how many threads."""
    import torch

    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }
