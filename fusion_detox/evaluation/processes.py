"""Which part of the work this process does, under ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fusion_detox.errors import MissingExtraError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of a run; one alone by default.

    Attributes:
        rank: Its number, 0 for the one that writes the report.
        count: How many there are.
        state: accelerate's ``PartialState``, which knows the devices and waits for the others.
    """

    rank: int = 0
    count: int = 1
    state: Any = None

    @classmethod
    def current(cls, *, cpu: bool = False) -> Processes:
        """The processes that a launcher started, or this one alone.

        Args:
            cpu: Use no accelerator.

        Raises:
            MissingExtraError: A launcher started several, and accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingExtraError("accelerate", "evaluate") from error
        # Others may wait for as long as one of them measures or scores.
        state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=7))
        return cls(state.process_index, state.num_processes, state)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what all share."""
        return self.rank == 0

    def device(self, wanted: str | None) -> str | torch.device:
        """The device of this process: as the user wants, else its own accelerator, else the CPU."""
        import torch

        if self.state is not None and (wanted is None or wanted == "cuda"):
            device: torch.device = self.state.device
            return device
        return wanted or ("cuda" if torch.cuda.is_available() else "cpu")

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``count``-th item, which spreads items that are sorted by cost evenly."""
        return list(items[self.rank :: self.count])

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()
