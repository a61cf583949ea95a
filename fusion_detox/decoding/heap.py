"""Gives the operating system back what glibc's allocator keeps of freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_EVERY, _GROWTH = 16, 512 * 2**20
_STATM = Path("/proc/self/statm")


class Heap:
    """Trims the heap whenever the process has grown by half a gigabyte.

    A fused step needs tensors of some megabytes, of another size each time, and glibc neither
    fills the holes between them nor returns them: a process of 0.6 GiB grows to several over some
    thousand steps. Where there is no glibc, or no ``/proc``, nothing is done.
    """

    def __init__(self) -> None:
        self._calls, self._low = 0, _resident()
        self._trim = None
        with contextlib.suppress(OSError, AttributeError, TypeError):
            self._trim = ctypes.CDLL(None).malloc_trim

    def watch(self) -> None:
        """To be called at each step; looks at the size now and then."""
        self._calls += 1
        if self._trim is None or self._calls % _EVERY:
            return
        size = _resident()
        if size > self._low + _GROWTH:
            self._trim(0)
            self._low = _resident()
        self._low = min(self._low, size)


def _resident() -> int:
    """Bytes of the process in memory, 0 where that cannot be told."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0
