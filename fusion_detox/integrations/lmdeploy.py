"""Fusion in LMDeploy's PyTorch engine, as a logits processor of a request.

    from lmdeploy import GenerationConfig, PytorchEngineConfig, pipeline
    from fusion_detox.integrations.lmdeploy import LMDeployFusion

    fusion = LMDeployFusion("MODEL", strength=1.5)
    pipe = pipeline("MODEL", backend_config=PytorchEngineConfig())
    pipe(prompts, gen_config=GenerationConfig(logits_processors=[fusion]))

The TurboMind engine and the HTTP server take no logits processors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusion_detox.calibrator.lookup import DEFAULT_CALIBRATOR
from fusion_detox.integrations.steps import fuse_or_end
from fusion_detox.integrations.workers import Source

__all__ = ["LMDeployFusion"]


class LMDeployFusion:
    """The logits processor of one or more requests: ``(input_ids, logits) -> logits``.

    LMDeploy calls it for one row at a time, so a batch costs as many calibrator steps as it has
    rows. An error in here would end all requests. So a text that cannot be fused may only end, and
    the log says why.

    Args:
        tokenizer: The target's tokenizer: a folder or hub id.
        calibrator: The path, hub id or shipped name of a calibrator.
        strength: The strength; by default, the one that the calibrator recommends.
        pad_token_id: The id with which LMDeploy pads histories on the left: the ``bos_token_id`` of
            the model's config.json, or 0 without one. By default, that of the tokenizer's BOS
            token, or 0.
        settings: Other fusion settings that differ from those that the calibrator recommends.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """

    def __init__(
        self,
        tokenizer: str,
        calibrator: str = DEFAULT_CALIBRATOR,
        strength: float | None = None,
        pad_token_id: int | None = None,
        **settings: Any,
    ) -> None:
        self._source = Source.of_request(tokenizer, calibrator, strength, settings)
        self._pad = pad_token_id

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Fuse one step of one row.

        Args:
            input_ids: ``(length,)`` all ids of the text so far, padded on the left.
            logits: ``(vocab,)``; not modified.

        Returns:
            ``(vocab,)`` log-probs in the dtype of ``logits``.
        """
        processor, start_id, end = self._source.load()
        pad = (start_id or 0) if self._pad is None else self._pad
        ids: list[int] = input_ids.tolist()
        start = next((place for place, id in enumerate(ids) if id != pad), len(ids))
        return fuse_or_end(processor, [ids[start:]], logits[None], [None], [end])[0]
