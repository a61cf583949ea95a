"""Locks between processes. The system releases the lock of a process that ends or is killed."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from fusion_detox.errors import DataFileError
from fusion_detox.files.forks import renew_after_fork

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

# What a file system without locks answers.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


class Lock:
    """An exclusive lock on a file that holds its holder's process id.

    Threads exclude one another, too. A forked child does not inherit the lock.

    Args:
        path: The file. Its folder must exist; the file exists only while it is held, or if its
            holder was killed.

    Attributes:
        holder: While another process has the lock, its process id and, if it is not this one, its
            machine; ``None`` if unknown.
        left: Whether the last holder was killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.holder: str | None = None
        self.left = False
        self._file: int | None = None
        renew_after_fork(self)

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock, and return whether that succeeded; with ``wait``, it always does.

        Raises:
            OSError: The file cannot be written, or the file system has no locks.
        """
        while True:
            file = os.open(self.path, _FLAGS, 0o666)
            try:
                taken = _lock(file, wait)
                content = os.read(file, 300).decode("utf-8", "replace").split()
                # The last holder removes the file, perhaps between our opening and locking it.
                if taken and _is_at(file, self.path):
                    os.ftruncate(file, 0)
                    os.lseek(file, 0, os.SEEK_SET)
                    os.write(file, f"{os.getpid()} {platform.node()}\n".encode())
                    self.left, self._file = bool(content), file
                    file = -1
                    return True
            finally:
                if file >= 0:
                    os.close(file)
            if not taken:
                where = f" on {content[1]}" if content[1:] not in ([], [platform.node()]) else ""
                self.holder = content[0] + where if content else None
                return False

    def release(self) -> None:
        """Give the lock back, and remove its file."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # Windows cannot remove an open file
            if _is_at(self._file, self.path):
                self.path.unlink()
        os.close(self._file)
        self._file = None

    def after_fork(self) -> None:
        """Close the child's copy, which would keep the lock after the parent has ended."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


@contextlib.contextmanager
def sole_process(path: Path, what: str) -> Iterator[None]:
    """Hold the lock ``path`` as the only process that works on ``what``.

    Raises:
        DataFileError: Another process holds it, or the lock cannot be written.
    """
    lock = Lock(path)
    try:
        taken = lock.acquire()
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise DataFileError(
                f"cannot write to {path.parent}: {error.strerror}; choose a writable folder"
            ) from error
        logger.warning("%s has no locks, so do not run two commands on %s", path.parent, what)
        taken = True
    if not taken:
        who = f"another command (process {lock.holder})" if lock.holder else "another command"
        raise DataFileError(
            f"{who} is working on {what}; wait until it ends, or choose another output"
        )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Create the folders above ``path``, and afterwards remove those that stayed empty.

    Raises:
        NotADirectoryError: One of them is a file.
        OSError: They cannot be created.
    """
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
    created = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in created:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Be the only process that writes ``output``, a file or folder that need not exist yet.

    Its parents are created. The lock is a hidden file beside it.

    Raises:
        DataFileError: Another process holds the lock, or the folder cannot be written.
    """
    output = Path(os.path.realpath(output))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(parents_of(output))
        except NotADirectoryError as error:
            raise DataFileError(f"{error}; choose another output") from error
        except OSError as error:
            raise DataFileError(
                f"cannot create the folder {output.parent}: {error.strerror}; choose another output"
            ) from error
        with sole_process(output.with_name(f".{output.name}.lock"), str(output)):
            yield


def claims(parameter: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to be :func:`claimed` for the path in one of its parameters.

    Of the processes that a launcher started, only the first takes the lock.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            path = signature.bind(*args, **kwargs).arguments[parameter]
            first = os.environ.get("RANK", "0") == "0"
            with claimed(Path(path).expanduser()) if first else contextlib.nullcontext():
                return function(*args, **kwargs)

        return wrapper

    return decorate


if sys.platform == "win32":
    import msvcrt
    import time

    # Far behind the content, since Windows does not let others read a locked byte.
    _BYTE = 1 << 30

    def _lock(file: int, wait: bool) -> bool:
        while True:
            try:
                os.lseek(file, _BYTE, os.SEEK_SET)
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.1)
            finally:
                os.lseek(file, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(file: int, wait: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False
