r"""Fusion in SGLang, as a custom logit processor.

Start the server with custom logit processors, and without the overlap schedule, in which a
processor sees texts that lack their last token::

    FUSION_DETOX_TOKENIZER=MODEL python -m sglang.launch_server --model-path MODEL \
        --enable-custom-logit-processor --disable-overlap-schedule

Each request names the processor, and may set its own strength::

    {"text": "…", "custom_logit_processor": SGLangFusion.to_str(),
     "sampling_params": {"custom_params": {"strength": 1.5}}}

``fusion_detox.integrations.workers`` lists the server's settings.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

from torch import Tensor

from fusion_detox.errors import ConfigError, MissingExtraError
from fusion_detox.integrations.steps import fuse_or_end
from fusion_detox.integrations.workers import Source

try:
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
except ImportError as _error:
    raise MissingExtraError("sglang", "sglang") from _error

__all__ = ["SGLangFusion"]

logger = logging.getLogger(__name__)

_REMEMBERED = 4096
# Output lengths of recent requests at their last step, to notice texts that lag behind.
_lengths: OrderedDict[str, int] = OrderedDict()


class SGLangFusion(CustomLogitProcessor):  # type: ignore[misc]
    """Fuses the rows of the requests that name it.

    SGLang creates an instance for each batch. The processor behind it is loaded once per process.
    An error in here would end the server. So a request that cannot be fused may only end, and the
    server's log says why.
    """

    def __call__(
        self, logits: Tensor, custom_param_list: list[dict[str, Any] | None] | None = None
    ) -> Tensor:
        """Fuse one step.

        Args:
            logits: ``(requests, vocab)``; not modified.
            custom_param_list: For each row, the request's ``custom_params`` and, as ``__req__``,
                the request itself.

        Returns:
            ``(requests, vocab)`` log-probs.

        Raises:
            FusionDetoxError: At the first step, if the server's settings are wrong.
        """
        processor, _, end = Source.from_environment().load()
        params = custom_param_list or []
        if len(params) != len(logits):
            error = ConfigError(
                f"{len(logits)} rows of logits came for {len(params)} requests, as with "
                "speculative decoding, whose drafts a processor does not see: start the server "
                "without it"
            )
            return fuse_or_end(processor, [[]] * len(logits), logits, [error] * len(logits), [end])
        rows = [_text(each) for each in params]
        return fuse_or_end(processor, rows, logits, [_strength(each) for each in params], [end])


def _strength(params: dict[str, Any] | None) -> object:
    """What a request asks for, or its error."""
    if not params or "__req__" not in params:
        return ConfigError(
            "the request has no custom_params, without which SGLang does not pass its text: send "
            '"custom_params": {} in its sampling_params'
        )
    unknown = sorted(set(params) - {"__req__", "strength"})
    if unknown:
        return ConfigError(
            f"unknown custom_params: {', '.join(unknown)}; the only one of fusion is strength"
        )
    return params.get("strength")


def _text(params: dict[str, Any] | None) -> list[int]:
    request = (params or {}).get("__req__")
    if request is None:
        return []
    length = len(request.output_ids)
    if length and _lengths.get(request.rid) == length:
        logger.warning(
            "the text of request %s has not grown since the last step, so fusion reads it without "
            "its last tokens: start the server with --disable-overlap-schedule",
            request.rid,
        )
    _lengths[request.rid] = length
    _lengths.move_to_end(request.rid)
    if len(_lengths) > _REMEMBERED:
        _lengths.popitem(last=False)
    return [*request.origin_input_ids, *request.output_ids]
