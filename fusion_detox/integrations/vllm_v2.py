"""Fusion in vLLM's model runner V2, which keeps the texts of its requests on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_detox.errors import MissingExtraError
from fusion_detox.integrations.server_settings import RequestSettings
from fusion_detox.integrations.vllm_step import PLACEHOLDER, VLLMStep, check_request

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError as _error:
    raise MissingExtraError("vllm", "vllm") from _error

__all__ = ["FusionV2"]


class FusionV2(LogitsProcessorV2):  # type: ignore[misc]
    """Fuses the rows of vLLM's model runner V2.

    Each step copies only the tokens that are new to the host. With speculative decoding, a request
    has a row for each draft token, and each is fused after the drafts before it.

    Args:
        vllm_config: The engine's configuration.
        req_states: The engine's buffers.

    Raises:
        FusionDetoxError: See ``VLLMStep``.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._step = VLLMStep(vllm_config, req_states.device)
        self._states = req_states
        self._asked: dict[int, RequestSettings] = {}
        self._texts: dict[int, list[int]] = {}  # committed tokens, copied to the host

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request, before it reaches the engine.

        Raises:
            ConfigError: See ``ServerSettings.of_request``; or it is a step of a beam search.
        """
        check_request(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a request into a slot, whose former request is forgotten.

        Returns:
            Whether the request is fused.
        """
        self._texts.pop(req_idx, None)
        self._asked.pop(req_idx, None)
        asked = self._step.asked_by(sampling_params)
        if asked is not None:
            self._asked[req_idx] = asked
        return asked is not None

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Fuse one step.

        Args:
            logits: ``(rows, vocab)``; rows of fused requests are overwritten, as vLLM allows.
            ctx: The rows' slots, drafts and positions.

        Returns:
            ``logits``.
        """
        if not any(slot in self._asked for slot in ctx.idx_mapping_np.tolist()):
            return logits  # without waiting for the device
        columns = (ctx.expanded_idx_mapping, ctx.expanded_local_pos, ctx.pos, ctx.input_ids)
        slots, drafts, positions, fed = torch.stack([each.long() for each in columns]).tolist()
        rows = [row for row, slot in enumerate(slots) if slot in self._asked]
        lengths = {slots[row]: positions[row] - drafts[row] + 1 for row in rows}
        self._read(lengths)
        texts = []
        for row in rows:
            text = self._texts[slots[row]]
            first = row - drafts[row]
            # The text must end in what the target read last. The request's drafts follow in order.
            known = bool(text) and text[-1] == fed[first]
            texts.append([*text, *fed[first + 1 : row + 1]] if known else [PLACEHOLDER])
        logits[rows] = self._step.fuse(
            logits[rows], texts, [self._asked[slots[row]] for row in rows]
        )
        return logits

    def _read(self, lengths: dict[int, int]) -> None:
        """Bring the texts of slots up to their lengths, in one copy from the device."""
        wanted = {}
        for slot, length in lengths.items():
            text = self._texts.setdefault(slot, [])
            del text[length:]  # vLLM took tokens back
            if len(text) < length:
                wanted[slot] = length - len(text)
        if not wanted:
            return
        ids = self._states.all_token_ids.gpu
        places = [
            (slot, len(self._texts[slot]) + offset)
            for slot, count in wanted.items()
            for offset in range(count)
        ]
        found = iter(ids[torch.tensor(places, device=ids.device).unbind(1)].tolist())
        for slot, count in wanted.items():
            self._texts[slot] += [next(found) for _ in range(count)]
