"""Renews locks after ``os.fork``: one that another thread held would stay locked in the child."""

from __future__ import annotations

import os
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


def _renew() -> None:
    for owner in list(_objects):
        owner.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew)
