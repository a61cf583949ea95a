"""Fusion in vLLM 0.32 or later.

Name the class when you start the server, and set strengths by request::

    vllm serve MODEL --logits-processors fusion_detox.integrations.vllm:FusionVLLM

    client.completions.create(..., extra_body={"vllm_xargs": {"fusion_strength": 1.5}})

In Python::

    LLM(MODEL, logits_processors=["fusion_detox.integrations.vllm:FusionVLLM"])

The server's settings are in the environment: see ``ServerSettings.from_environment``. Do not
register the class as an entry point: vLLM does not prepare the texts for plug-ins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_detox.errors import MissingExtraError
from fusion_detox.integrations.server_settings import RequestSettings
from fusion_detox.integrations.vllm_step import VLLMStep, check_request
from fusion_detox.integrations.vllm_v2 import FusionV2

try:
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
    from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError as _error:
    raise MissingExtraError("vllm", "vllm") from _error

__all__ = ["FusionV1", "FusionVLLM"]


class _Request(NamedTuple):
    """A row's request."""

    asked: RequestSettings
    prompt: list[int]
    output: list[int]  # vLLM appends to it

    def text(self) -> list[int]:
        return [*self.prompt, *self.output]


class FusionV1(LogitsProcessorV1):  # type: ignore[misc]
    """Fuses the rows of vLLM's V1 model runner.

    Args:
        vllm_config: The engine's configuration.
        device: The device of the logits.
        is_pin_memory: Not used.

    Raises:
        FusionDetoxError: See ``VLLMStep``.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._step = VLLMStep(vllm_config, device)
        self._requests: dict[int, _Request] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request, before it reaches the engine.

        Raises:
            ConfigError: See ``ServerSettings.of_request``; or it is a step of a beam search.
        """
        check_request(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Whether greedy decoding may leave this processor out: no."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests as they come, go and change rows.

        Args:
            batch_update: What has changed since the last step.
        """
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._requests.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            asked = self._step.asked_by(params)
            if asked is None:
                self._requests.pop(row, None)
            else:
                self._requests[row] = _Request(asked, prompt or [], output)
        for source, target, direction in batch_update.moved:
            moving = self._requests.pop(source, None)
            other = self._requests.pop(target, None)
            if moving is not None:
                self._requests[target] = moving
            if other is not None and direction == MoveDirectionality.SWAP:
                self._requests[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Fuse one step.

        Args:
            logits: ``(requests, vocab)``; rows of fused requests are overwritten, as vLLM allows.

        Returns:
            ``logits``.
        """
        rows = sorted(row for row in self._requests if row < len(logits))
        if rows:
            requests = [self._requests[row] for row in rows]
            logits[rows] = self._step.fuse(
                logits[rows],
                [request.text() for request in requests],
                [request.asked for request in requests],
            )
        return logits


class FusionVLLM(LogitsProcessorV1, LogitsProcessorV2):  # type: ignore[misc]
    """The class to name in vLLM: creates a ``FusionV1`` or a ``FusionV2``, as its runner needs.

    Both runners load only subclasses of their own interface, so this one is a subclass of both.
    """

    def __new__(cls, vllm_config: Any, *arguments: Any) -> Any:
        """Create the processor of the runner that calls."""
        kind: Any = FusionV1 if isinstance(arguments[0], torch.device) else FusionV2
        return kind(vllm_config, *arguments)

    validate_params = FusionV1.validate_params
