"""Returns freed memory to the operating system, which glibc's allocator would keep."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_GROWTH = 512 * 2**20
_STATM = Path("/proc/self/statm")


class Heap:
    """Trims the heap whenever the process has grown by half a gigabyte.

    Each fused step allocates several megabytes of tensors of varying sizes. glibc neither
    reuses the gaps between them nor returns them to the system, so a process of 0.6 GiB grows to
    several GiB within a few thousand steps. Without glibc or ``/proc``, this class does nothing.
    """

    def __init__(self) -> None:
        self._low = _resident()
        self._trim = None
        with contextlib.suppress(OSError, AttributeError, TypeError):
            self._trim = ctypes.CDLL(None).malloc_trim

    def watch(self) -> None:
        """Trims the heap if it has grown enough. Call it after each batch or step."""
        if self._trim is None:
            return
        size = _resident()
        if size > self._low + _GROWTH:
            self._trim(0)
            self._low = _resident()
        self._low = min(self._low, size)


def _resident() -> int:
    """Resident memory of the process in bytes, or 0 if unknown."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0
