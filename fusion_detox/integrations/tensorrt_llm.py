"""Fusion in TensorRT-LLM, as a logits processor of the LLM API.

    from tensorrt_llm import LLM, SamplingParams
    from fusion_detox.integrations.tensorrt_llm import TensorRTFusion

    fusion = TensorRTFusion("MODEL", strength=1.5)
    LLM("MODEL").generate(prompts, SamplingParams(logits_processor=fusion))

A request with another strength gets a ``TensorRTFusion`` of its own. All share what a worker loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_detox.calibrator.lookup import DEFAULT_CALIBRATOR
from fusion_detox.errors import ConfigError, MissingExtraError
from fusion_detox.integrations.steps import fuse_or_end
from fusion_detox.integrations.workers import Source

try:
    from tensorrt_llm.sampling_params import BatchedLogitsProcessor, LogitsProcessor
except ImportError as _error:
    raise MissingExtraError("tensorrt_llm", "tensorrt-llm") from _error

__all__ = ["BatchedTensorRTFusion", "TensorRTFusion"]


class TensorRTFusion(LogitsProcessor):  # type: ignore[misc]
    """The logits processor of one or more requests. Only names travel to the workers.

    An error in a worker would end all requests. So a text that cannot be fused may only end, and
    the worker's log says why. Beams are fused as rows of their own.

    Args:
        tokenizer: The target's tokenizer: a folder or hub id.
        calibrator: The path, hub id or shipped name of a calibrator.
        strength: The strength; by default, the one that the calibrator recommends.
        settings: Other fusion settings that differ from those that it recommends.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """

    def __init__(
        self,
        tokenizer: str,
        calibrator: str = DEFAULT_CALIBRATOR,
        strength: float | None = None,
        **settings: Any,
    ) -> None:
        self._source = Source.of_request(tokenizer, calibrator, strength, settings)

    def __call__(
        self,
        req_id: int,
        logits: Tensor,
        token_ids: list[list[int]],
        stream_ptr: int | None,
        client_id: int | None,
    ) -> None:
        """Fuse one step of one request, in place, as TensorRT-LLM requires.

        Args:
            req_id: Not used.
            logits: ``(1, beams, vocab)``.
            token_ids: For each beam, all ids of its text so far, the prompt included.
            stream_ptr: The CUDA stream of the logits; without one, the current stream.
            client_id: Not used.
        """
        _fuse(self._source, [logits], [token_ids], stream_ptr)


@dataclasses.dataclass
class BatchedTensorRTFusion(BatchedLogitsProcessor):  # type: ignore[misc]
    """One call for all requests of a step: ``LLM(batched_logits_processor=…)``.

    Requests take part with ``SamplingParams(apply_batched_logits_processor=True)``. All have the
    same strength, because TensorRT-LLM passes no settings of a request.

    Attributes:
        single: The settings, as a processor of one request.
    """

    single: TensorRTFusion

    def __call__(
        self,
        req_ids: list[int],
        logits: list[Tensor],
        token_ids: list[list[list[int]]],
        stream_ptr: int,
        client_ids: list[int | None],
    ) -> None:
        """Fuse one step of several requests, in place; see :class:`TensorRTFusion`."""
        _fuse(self.single._source, logits, token_ids, stream_ptr)


def _fuse(
    source: Source,
    logits: Sequence[Tensor],
    token_ids: Sequence[Sequence[Sequence[int]]],
    stream_ptr: int | None,
) -> None:
    processor, _, end = source.load()
    rows: list[Sequence[int]] = []
    asked: list[object] = []
    for each, beams in zip(logits, token_ids, strict=True):
        count = each.numel() // each.shape[-1]
        if count == len(beams):
            rows += beams
            asked += [None] * count
        else:
            error = ConfigError(
                f"{count} rows of logits came for {len(beams)} beams, as with speculative "
                "decoding, whose drafts a processor does not see: use no speculative decoding"
            )
            rows += [[]] * count
            asked += [error] * count
    flat = [each.reshape(-1, each.shape[-1]) for each in logits]
    cuda: Any = torch.cuda
    with cuda.stream(cuda.ExternalStream(stream_ptr) if stream_ptr else None):
        fused = fuse_or_end(processor, rows, torch.cat(flat), asked, [end])
        for each, new in zip(logits, torch.split(fused, [len(part) for part in flat]), strict=True):
            each.copy_(new.view(each.shape))
