"""Finding the checkpoint from which a killed training goes on."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)


def newest_checkpoint(folder: Path, weights: str = "model.safetensors") -> Path | None:
    """The newest whole ``checkpoint-N`` of a folder; what a kill left half-written is removed.

    Args:
        folder: Where ``transformers.Trainer`` writes them; need not exist.
        weights: Name of the weights' file in a checkpoint.
    """
    numbered = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    for checkpoint in numbered:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            for file in _weights(checkpoint, weights):
                with safe_open(file, framework="pt") as tensors:
                    tensors.keys()
            needed = ("optimizer.pt", "scheduler.pt")
            if all((checkpoint / name).stat().st_size for name in needed):
                return checkpoint
        except (OSError, ValueError, KeyError, SafetensorError):
            pass
        logger.warning("%s is incomplete and is not used", checkpoint)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _weights(checkpoint: Path, name: str) -> list[Path]:
    """The file of the weights, or its shards."""
    index = checkpoint / f"{name}.index.json"
    if not index.exists():
        return [checkpoint / name]
    shards = json.loads(index.read_text())["weight_map"].values()
    return [checkpoint / shard for shard in sorted(set(shards))]


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a ``checkpoint-N`` was written."""
    return int(checkpoint.name.rpartition("-")[2])
