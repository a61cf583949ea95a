"""The processes that share an evaluation's work, and facts about the machine."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fusion_detox.errors import MissingExtraError
from fusion_detox.files.versions import installed_versions

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "sentence-transformers")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that ``accelerate launch`` or ``torchrun`` started.

    Attributes:
        rank: Number of this process; process 0 writes the report.
        count: Number of processes.
        state: accelerate's ``PartialState``; ``None`` for a single process.
    """

    rank: int = 0
    count: int = 1
    state: Any = None

    @classmethod
    def current(cls, *, cpu: bool = False) -> Processes:
        """The processes that a launcher started, or only this one.

        Args:
            cpu: Use the CPU even if there is an accelerator.

        Raises:
            MissingExtraError: A launcher started several, and accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingExtraError("accelerate", "evaluate") from error
        # The other processes wait while one of them measures or scores, which may take a long time.
        state = PartialState(cpu=cpu, timeout=datetime.timedelta(days=7))
        return cls(state.process_index, state.num_processes, state)

    @property
    def first(self) -> bool:
        """Whether this process writes the shared files."""
        return self.rank == 0

    def device(self, wanted: str | None) -> str | torch.device:
        """The device for this process: ``wanted``, else its accelerator, else the CPU."""
        import torch

        if self.state is not None and (wanted is None or wanted == "cuda"):
            device: torch.device = self.state.device
            return device
        return wanted or ("cuda" if torch.cuda.is_available() else "cpu")

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``count``-th item, which balances items that are sorted by cost."""
        return list(items[self.rank :: self.count])

    def wait(self) -> None:
        """Waits until all processes have reached this call."""
        if self.state is not None:
            self.state.wait_for_everyone()


def versions() -> dict[str, str]:
    """Versions of the packages that affect the numbers."""
    from fusion_detox import __version__

    return {"fusion_detox": __version__, **installed_versions(*_PACKAGES)}


def machine_facts(device: Any) -> dict[str, Any]:
    """The target's device, the number of threads and the processor type."""
    import torch

    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }
