"""Running the calibrator while the target runs, on another thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Overlap:
    """Guesses the rows of the next step from what the target is given, and reads them meanwhile.

    The reading only fills the caches of the processor. So a wrong guess, such as after beams have
    changed places, costs time and never changes a result.

    Args:
        read: Reads rows of int64 ids, each as bytes, so that the next step finds them cached.
    """

    def __init__(self, read: Callable[[list[bytes]], None]) -> None:
        self._read = read
        self._rows: list[bytes] | None = None
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fusion-detox")

    def before_target(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook of the target: starts reading what it is about to read."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return
        new = [row.tobytes() for row in ids.to("cpu", torch.int64).numpy()]
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            if self._rows is None or len(self._rows) != len(new):
                return
            new = [row + more for row, more in zip(self._rows, new, strict=True)]
        self.wait()
        self._pending = self._thread.submit(self._read, new)

    def wait(self) -> None:
        """Waits until nothing is being read."""
        pending, self._pending = self._pending, None
        if pending is not None and (error := pending.exception()) is not None:
            # The step itself meets the same error, if it matters, and raises it.
            logger.debug("reading ahead failed: %s", error)

    def after_step(self, rows: list[bytes]) -> None:
        """Notes the rows of a step, which the next ones continue."""
        self._rows = rows

    def close(self) -> None:
        """Ends the thread."""
        self.wait()
        self._thread.shutdown()
