"""Files and folders that are either complete or as they were before."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

UNFINISHED = ".new-"
"""Part of the name of a folder that is still being written; it starts with a dot."""


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and moves it there if the block succeeds.

    The folder must exist. What was there before is kept if the block, or the move, fails.

    Raises:
        OSError: The file cannot be moved into place.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file completely or not at all; its folder must exist.

    Raises:
        OSError: It cannot be written; what was there before is kept.
    """
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing_folder(folder: Path, *, keep: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Yields a new folder, which takes the place of ``folder`` if the block succeeds.

    If it fails, ``folder`` stays as it was, and parents that were created for it are removed.

    Args:
        folder: The folder to write or replace.
        keep: Given the name of an entry of the old folder, whether to carry it over to the new one;
            by default nothing is.

    Raises:
        OSError: The folder cannot be created or moved into place.
    """
    for parent in folder.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
    created = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}{UNFINISHED}"))
    try:
        new, old = beside / "new", beside / "old"
        new.mkdir()  # with the user's usual permissions, unlike mkdtemp's
        yield new
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            if old.exists():
                os.rename(old, folder)
            raise
        if keep is not None and old.exists():
            for entry in old.iterdir():
                if keep(entry.name):
                    os.rename(entry, folder / entry.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):  # it is in use by now
                parent.rmdir()
