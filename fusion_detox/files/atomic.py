"""Write files and folders so that they are either complete or unchanged, even after a kill.

One process at a time replaces a path; others wait. A hidden lock file beside the path tells the
next writer that the last one was killed. It then clears away what that one left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from fusion_detox.files.locks import Lock, parents_of

UNFINISHED = ".new-"
"""Part of the name of what is still being written; the name starts with a dot."""

_LOCK = ".writing"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path and move it to ``path`` if the block succeeds.

    The folder must exist. If the block or the move fails, ``path`` is unchanged.

    Raises:
        OSError: The file cannot be moved to ``path``.
    """
    with _sole_writer(path):
        temporary = path.with_name(f".{path.name}{UNFINISHED}{uuid.uuid4().hex[:8]}")
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

    On Linux, old and new folder change places in one step. Elsewhere, and on file systems that
    cannot do this, there is no folder for an instant; if the process is killed then,
    :func:`recover` restores the old one.

    Args:
        folder: The folder to write or replace.
        keep: Given the name of an entry of the old folder, whether the new folder gets it too,
            unless the block has written it; by default, nothing is kept.

    Raises:
        OSError: The folder cannot be created or moved to its place.
    """
    with parents_of(folder), _sole_writer(folder):
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}{UNFINISHED}"))
        try:
            new = beside / "new" / folder.name
            new.mkdir(parents=True)  # with the usual permissions, unlike mkdtemp's
            yield new
            if keep is not None and folder.is_dir():
                link_entries(folder, new, keep)
            _replace(folder, new)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def link_entries(source: Path, target: Path, wanted: Callable[[str], bool]) -> None:
    """Give a folder the entries that it lacks of another, as hard links where that is possible.

    Linked files share their content, so they must be replaced, not rewritten.
    """
    for entry in source.iterdir():
        to = target / entry.name
        if not wanted(entry.name) or os.path.lexists(to):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, to, symlinks=True, copy_function=_link)
        else:
            _link(entry, to)


def recover(path: Path) -> None:
    """Restore a folder if its replacement was killed, and remove what the killed process left.

    If a living process is writing a path that does not exist yet, wait for it.
    """
    lock = _lock_of(path)
    if not lock.path.exists():
        return
    with contextlib.suppress(OSError):  # a read-only folder; then there is nothing to restore
        if lock.acquire(wait=not path.exists()):
            try:
                _clear(path)
            finally:
                lock.release()


def recover_entries(folder: Path) -> None:
    """:func:`recover` each entry of a folder; the folder need not exist."""
    for lock in folder.glob(f".*{_LOCK}"):
        recover(folder / lock.name[1 : -len(_LOCK)])


@contextlib.contextmanager
def _sole_writer(path: Path) -> Iterator[None]:
    """Wait for other writers of ``path``, and clear away what a killed one left."""
    lock = _lock_of(path)
    # Without locks, as on some network drives, two writers still do not mix their files.
    with contextlib.suppress(OSError):
        lock.acquire(wait=True)
    try:
        if lock.left:
            _clear(path)
        yield
    finally:
        lock.release()


def _lock_of(path: Path) -> Lock:
    return Lock(path.with_name(f".{path.name}{_LOCK}"))


def _clear(path: Path) -> None:
    prefix = f".{path.name}{UNFINISHED}"
    for beside in path.parent.iterdir():
        if beside.name.startswith(prefix) and len(beside.name) == len(prefix) + 8:
            old = beside / "old"
            if old.exists() and not os.path.lexists(path):
                os.rename(old, path)
            if beside.is_dir() and not beside.is_symlink():
                shutil.rmtree(beside, ignore_errors=True)
            else:
                beside.unlink(missing_ok=True)


def _replace(folder: Path, new: Path) -> None:
    if not os.path.lexists(folder):
        os.rename(new, folder)
    elif not _exchange(new, folder):
        old = new.parent.with_name("old")
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            os.rename(old, folder)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, and return whether the system can do that."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux with glibc 2.28 or later
        return False
    names = [os.fsencode(path) for path in (one, other)]
    return bool(swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)
