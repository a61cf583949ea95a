"""The user's cache folder, for what is computed or fetched once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(given: str | os.PathLike[str] | None = None) -> Path:
    """The given folder, else ``$FUSION_DETOX_CACHE``, else ``~/.cache/fusion-detox``."""
    root = given or os.environ.get("FUSION_DETOX_CACHE") or "~/.cache/fusion-detox"
    return Path(root).expanduser()
