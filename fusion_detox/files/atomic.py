"""Write files and folders so that they are either complete or unchanged."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

UNFINISHED = ".new-"
"""Part of the name of a folder that is still being written; the name starts with a dot."""


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path and move it to ``path`` if the block succeeds.

    The folder must exist. If the block or the move fails, ``path`` is unchanged.

    Raises:
        OSError: The file cannot be moved to ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file completely or not at all; its folder must exist.

    Raises:
        OSError: The file cannot be written; it is unchanged.
    """
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing_folder(folder: Path, *, keep: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Yield a new folder, which replaces ``folder`` if the block succeeds.

    If the block fails, ``folder`` is unchanged, and parents that were created for it are removed.

    Args:
        folder: The folder to write or replace.
        keep: Given the name of an entry of the old folder, whether to move it to the new one; by
            default, nothing is moved.

    Raises:
        OSError: The folder cannot be created or moved to its place.
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
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()
