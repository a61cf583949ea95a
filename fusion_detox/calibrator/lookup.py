"""Where a calibrator is: a folder, a shipped one, or a hub repository."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from fusion_detox.calibrator.reading import HUB_FILES
from fusion_detox.calibrator.shipped import find_shipped, shipped_names
from fusion_detox.errors import (
    CalibratorError,
    CalibratorNotFoundError,
    ModelError,
    ModelNotFoundError,
)
from fusion_detox.files.models import download

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_calibrator(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a calibrator: a path, a shipped one, or one that is downloaded.

    Raises:
        CalibratorNotFoundError: There is none of that name, or the hub cannot be reached.
        CalibratorError: The hub repository is no calibrator.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CalibratorNotFoundError(
            f"{path} is a file. Give the folder of a calibrator, the one with calibrator.json."
        )
    name = os.fspath(name_or_path)
    shipped = find_shipped(name)
    if shipped is not None:
        return shipped
    if not _HUB_ID.fullmatch(name):
        raise CalibratorNotFoundError(_nothing_called(name, path))
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
            f"The hub repository {name} is no calibrator: it has no calibrator.json. A model to "
            f"detoxify is not a calibrator; shipped ones: {', '.join(shipped_names()) or 'none'}."
        )
    return folder


def _nothing_called(name: str, path: Path) -> str:
    names = shipped_names()
    known = ", ".join(names) or "none in this installation"
    if path.is_absolute() or name.startswith((".", "~")):
        return f"There is no folder {path}. Check the path, or use a shipped calibrator: {known}."
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"There is no calibrator {name!r}: no folder of that name, and none that is shipped "
        f"(shipped: {known}).{meant} A hub id has the form 'organisation/name'."
    )
