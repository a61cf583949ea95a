"""Find a calibrator by name: a folder, one that ships with the library, or a hub repository."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from fusion_detox.errors import (
    CalibratorError,
    CalibratorNotFoundError,
    ModelError,
    ModelNotFoundError,
)
from fusion_detox.files.atomic import recover

DEFAULT_CALIBRATOR = "english-16k"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PACKAGE = Path(__file__).resolve().parents[1]


def find_calibrator(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a calibrator; downloads it if the name is a hub id.

    The arguments are those of ``Calibrator.from_pretrained``.

    Raises:
        CalibratorNotFoundError: No calibrator has that name, or the hub cannot be reached.
        CalibratorError: The hub repository is not a calibrator.
    """
    path = Path(name_or_path).expanduser()
    recover(path)
    if path.is_dir():
        return path
    if path.exists():
        raise CalibratorNotFoundError(
            f"{path} is a file. Give the calibrator's folder, the one that holds calibrator.json."
        )
    name = os.fspath(name_or_path)
    shipped = find_shipped(name)
    if shipped is not None:
        return shipped
    if not _HUB_ID.fullmatch(name):
        raise CalibratorNotFoundError(_not_found(name, path))
    # The names of shipped calibrators are listed without loading torch.
    from fusion_detox.calibrator.folder import HUB_FILES
    from fusion_detox.files.models import download

    try:
        folder = download(
            name,
            HUB_FILES,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except (ModelNotFoundError, ModelError) as error:
        raise CalibratorNotFoundError(str(error)) from error
    if not (folder / "calibrator.json").is_file():
        raise CalibratorError(
            f"The hub repository {name} is not a calibrator: it has no calibrator.json. A model to "
            f"detoxify is not a calibrator. Shipped calibrators: "
            f"{', '.join(shipped_names()) or 'none'}."
        )
    return folder


def shipped_names() -> list[str]:
    """Names of the calibrators that ship with the library, sorted."""
    return sorted(_shipped())


def find_shipped(name: str) -> Path | None:
    """The folder of a shipped calibrator; ``None`` if no shipped calibrator has that name."""
    return _shipped().get(name)


def demo_target_path() -> Path:
    """The folder of the small model that the demo detoxifies.

    Raises:
        ModelNotFoundError: This installation does not include it.
    """
    # In an installed package, or in a checkout of the repository.
    candidates = (
        _PACKAGE / "_shipped" / "demo_target",
        _PACKAGE.parent / "examples" / "demo_target" / "model",
    )
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder
    raise ModelNotFoundError(
        f"The demo target is missing from {' and '.join(map(str, candidates))}. Reinstall the "
        f"package, or train the model with python -m recipes.demo_target."
    )


def _shipped() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in (_PACKAGE / "_shipped" / "calibrators", _PACKAGE.parent / "calibration_ckpts"):
        for path in folder.glob("*/calibrator.json"):
            found.setdefault(path.parent.name, path.parent)
    return found


def _not_found(name: str, path: Path) -> str:
    names = shipped_names()
    known = ", ".join(names) or "none in this installation"
    if path.is_absolute() or name.startswith((".", "~")):
        return f"There is no folder {path}. Check the path, or use a shipped calibrator: {known}."
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    suggestion = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"There is no calibrator {name!r}: neither a folder nor a shipped calibrator has that name "
        f"(shipped: {known}).{suggestion} A hub id has the form 'organisation/name'."
    )
