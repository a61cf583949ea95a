"""What all serving adapters share: strengths of requests, numpy scores, and how a request fails."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_detox.errors import ConfigError
from fusion_detox.processor import FusionLogitsProcessor

__all__ = ["check_shared", "fuse_array", "fuse_or_end", "only_end", "strength_of"]

logger = logging.getLogger(__name__)


def strength_of(processor: FusionLogitsProcessor, value: object) -> float:
    """The strength that a request asks for.

    Args:
        processor: The processor; its settings bound the strength.
        value: What the request says; ``None`` stands for the strength of the settings.

    Raises:
        ConfigError: It is not a number, is not finite, or is out of range.
    """
    if value is None:
        return processor.config.strength
    return processor.config.replace(strength=value).strength


def check_shared(processor: FusionLogitsProcessor, engine: str, remedy: str) -> None:
    """Refuse a processor whose settings belong to the prompts of one ``generate`` call.

    Args:
        processor: The processor.
        engine: The engine's name, for the message.
        remedy: How a request sets its own strength there, for the message.

    Raises:
        ConfigError: It has several strengths, or follows several texts.
    """
    if processor.prompts_followed > 1:
        raise ConfigError(
            f"following() was given {processor.prompts_followed} texts, but {engine} has no fixed "
            "order of requests: give one text for all, or prepend each text to the ids of its "
            "request"
        )
    if processor.strengths is not None:
        raise ConfigError(
            f"the processor has a strength for each of {len(processor.strengths)} prompts, but "
            f"{engine} has no fixed order of requests: give each request its own, {remedy}"
        )


def fuse_array(
    processor: FusionLogitsProcessor,
    rows: Sequence[Sequence[int]],
    scores: np.ndarray[Any, Any],
    strength: float | Sequence[float] | None = None,
) -> np.ndarray[Any, Any]:
    """``processor.fuse_rows`` for numpy arrays.

    Args:
        processor: The processor.
        rows: For each row, all ids of its text so far.
        scores: ``(batch, vocab)`` logits; not modified.
        strength: See ``fuse_rows``.

    Returns:
        ``(batch, vocab)`` a new array in the dtype of ``scores``.

    Raises:
        ConfigError: See ``fuse_rows``.
        DataError: See ``fuse_rows``.
        VocabularyError: See ``fuse_rows``.
    """
    own = torch.from_numpy(np.array(scores, order="C"))
    fused: np.ndarray[Any, Any] = processor.fuse_rows(rows, own, strength).cpu().numpy()
    return fused


def only_end(scores: Tensor, end_ids: Iterable[int]) -> Tensor:
    """Scores that let a text only end, for a request that failed inside an engine.

    Args:
        scores: ``(…, vocab)`` logits; not modified.
        end_ids: The ids that end a text.

    Returns:
        The shape of ``scores``: 0 for these ids, -inf for all others.
    """
    result = torch.full_like(scores, -torch.inf)
    result[..., list(end_ids)] = 0.0
    return result


def fuse_or_end(
    processor: FusionLogitsProcessor,
    rows: Sequence[Sequence[int]],
    scores: Tensor,
    strengths: Sequence[object],
    end_ids: Iterable[int],
) -> Tensor:
    """``processor.fuse_rows`` for engines in which an error would end all requests.

    A row that cannot be fused, such as one with an unknown strength, may only end, and the log says
    why. The other rows are fused as usual. No row is passed on unfused that should be fused.

    Args:
        processor: The processor.
        rows: For each row, all ids of its text so far.
        scores: ``(batch, vocab)`` logits; not modified.
        strengths: For each row, what its request says; see :func:`strength_of`.
        end_ids: The ids that end a text.

    Returns:
        ``(batch, vocab)`` a new tensor in the dtype of ``scores``.
    """
    result = scores.clone()
    wanted: dict[int, float] = {}
    for row, value in enumerate(strengths):
        try:
            wanted[row] = strength_of(processor, value)
        except ConfigError as error:
            _end(result, row, end_ids, error)
    good = list(wanted)
    try:
        result[good] = processor.fuse_rows(
            [rows[row] for row in good], scores[good], list(wanted.values())
        )
    except Exception:  # noqa: BLE001 - the rows tell which one it is
        for row in good:
            try:
                result[row] = processor.fuse_rows([rows[row]], scores[[row]], wanted[row])[0]
            except Exception as error:  # noqa: BLE001 - the engine must go on
                _end(result, row, end_ids, error)
    return result


def _end(scores: Tensor, row: int, end_ids: Iterable[int], error: Exception) -> None:
    logger.error("a request cannot be fused, so its text ends here: %s", error)
    scores[row] = only_end(scores[row], end_ids)
