"""The facts that identify a scorer's model in a record."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import huggingface_hub

_LICENCE = re.compile(r"^license:[ \t]*(\S.*)$", re.MULTILINE)


def identity(source: str, revision: str | None = None) -> dict[str, Any]:
    """Identifies a loaded model by name, commit, weights hash and licence.

    Args:
        source: A folder, or the id of a hub repository that is already cached.
        revision: Branch, tag or commit of a hub repository.

    Returns:
        ``model`` (the folder's name or the hub id), ``commit`` (for a hub repository), ``weights``
        (12 hex digits of the SHA-256 of its safetensors) and ``licence`` (as its card states).
    """
    local = Path(source).is_dir()
    folder: Path | None = Path(source)
    if not local:
        known = huggingface_hub.try_to_load_from_cache(
            source, "config.json", revision=revision or "main"
        )
        folder = Path(known).parent if isinstance(known, str) else None
    record: dict[str, Any] = {"model": Path(source).resolve().name if local else source}
    if folder is not None:
        if not local:
            record["commit"] = folder.name
        record["weights"] = weights_hash(folder)
    record["licence"] = _licence(folder) or "not stated in its files; see the model's card"
    return record


def weights_hash(*paths: Path) -> str:
    """12 hex digits of the SHA-256 of safetensors files; a folder stands for all files in it."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                while piece := opened.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest()[:12]


def _licence(folder: Path | None) -> str | None:
    card = None if folder is None else folder / "README.md"
    if card is None or not card.is_file():
        return None
    # The metadata block at the start of a card, between two lines of three dashes.
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    found = _LICENCE.search(head) if head.startswith("---") else None
    return found.group(1).strip() if found else None
