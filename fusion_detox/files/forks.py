"""Renews locks after ``os.fork``: one that another thread held would stay locked in the child."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forked(Protocol):
    """An object with a lock and caches behind it."""

    def after_fork(self) -> None:
        """Replaces the lock, and drops the caches that it protected."""


_objects: weakref.WeakSet[Forked] = weakref.WeakSet()


def renew_after_fork(owner: Forked) -> None:
    """Calls ``owner.after_fork()`` in every child process that is forked from now on."""
    _objects.add(owner)


class RenewedLock:
    """A lock for a module, which is free in a forked child."""

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Replaces the lock."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _renew() -> None:
    for owner in list(_objects):
        owner.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew)
