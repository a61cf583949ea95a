"""The user's cache folder, for what is computed or fetched once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(given: str | os.PathLike[str] | None = None) -> Path:
    """The given folder, else ``$FUSION_DETOX_CACHE``, else ``fusion-detox`` in the user's cache.

    The user's cache is ``$XDG_CACHE_HOME``, if that is an absolute path, else ``~/.cache``.
    """
    root = given or os.environ.get("FUSION_DETOX_CACHE")
    if not root:
        users = os.environ.get("XDG_CACHE_HOME", "")
        root = Path(users if os.path.isabs(users) else "~/.cache") / "fusion-detox"
    return Path(root).expanduser()
