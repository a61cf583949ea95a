"""One step of vLLM, for both of its model runners: who is fused how, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.errors import ConfigError, VocabularyError
from fusion_detox.files.models import load_tokenizer
from fusion_detox.integrations.metrics import FusionMetrics, MeasuredProcessor
from fusion_detox.integrations.server_settings import RequestSettings, ServerSettings
from fusion_detox.integrations.steps import fuse_or_end, only_end
from fusion_detox.processor import FusionLogitsProcessor

logger = logging.getLogger(__name__)

PLACEHOLDER = -1
"""Stands in a text for a token that vLLM has not filled in."""

_NOWHERE = RequestSettings(calibrator="", strength=1.0)


def check_request(params: Any) -> None:
    """Check a request at the front end, where an error becomes HTTP status 400.

    Args:
        params: The request's ``SamplingParams``.

    Raises:
        ConfigError: See ``ServerSettings.of_request``. Or the request is a step of a beam search.
    """
    asked = ServerSettings.from_environment().of_request(params.extra_args)
    # vLLM runs each step of a beam search as a request of this form, and ranks its beams by logits
    # from before the logits processors.
    step = params.max_tokens == 1 and not params.detokenize and params.logprobs is not None
    if step and asked.strength > 0:
        raise ConfigError(
            "vLLM's beam search ignores logits processors, so its text would not be fused: use "
            "sampling or greedy decoding. (A request for one token with logprobs and "
            "detokenize=False looks the same: set detokenize=True or fusion_strength=0.)"
        )


class VLLMStep:
    """The processors of a worker, one for each calibrator of the server.

    Args:
        vllm_config: The engine's configuration.
        device: The device of the logits.

    Raises:
        CalibratorError: A calibrator cannot be used.
        CalibratorNotFoundError: A calibrator was not found.
        ConfigError: A setting is unknown or out of range, the engine takes prompts of which a
            processor does not see the text, or the port for metrics is in use.
        MissingExtraError: Metrics are asked for, and ``prometheus_client`` is not installed.
        InertError: A processor would not change the text as its calibrator should.
        ModelError: The tokenizer cannot be loaded.
        VocabularyError: The vocabularies do not match, or no token ends a text.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        model = vllm_config.model_config
        if getattr(model, "enable_prompt_embeds", False):
            raise ConfigError(
                "with prompt embeddings, the text of a prompt is unknown and cannot be fused: "
                "start vLLM without --enable-prompt-embeds"
            )
        self.settings = ServerSettings.from_environment()
        tokenizer = load_tokenizer(model.tokenizer, revision=model.tokenizer_revision)
        if tokenizer.eos_token_id is None:
            raise VocabularyError(f"the tokenizer {model.tokenizer} has no token that ends a text")
        self._end: int = tokenizer.eos_token_id
        width = model.get_vocab_size()
        metrics = _serve_metrics(self.settings.metrics_port, vllm_config.parallel_config)
        self._processors: dict[str, FusionLogitsProcessor] = {}
        for name, source in self.settings.calibrators.items():
            processor = FusionLogitsProcessor(
                Calibrator.from_pretrained(source),
                tokenizer,
                self.settings.configs[name],
                device=self.settings.device,
            )
            # A vocabulary that does not match should fail here, and not at the first request.
            processor.fuse_rows([[self._end]], torch.zeros(1, width, device=device))
            if metrics is not None:
                processor = MeasuredProcessor(processor, metrics)
            self._processors[name] = processor
        logger.info(
            "fusion_detox fuses %s; default strength %g",
            " and ".join(self._processors),
            next(iter(self.settings.configs.values())).strength,
        )

    def asked_by(self, params: Any) -> RequestSettings | None:
        """How to fuse a request; ``None`` if fusion is off for it.

        The front end has refused bad requests, if it has the same settings. If not, the request
        gets no calibrator and may only end.
        """
        try:
            asked = self.settings.of_request(params.extra_args)
        except ConfigError as error:
            logger.error("a request passed the front end, but ends here: %s", error)
            return _NOWHERE
        return asked if asked.strength > 0 else None

    def fuse(
        self,
        logits: Tensor,
        rows: Sequence[Sequence[int]],
        asked: Sequence[RequestSettings],
    ) -> Tensor:
        """Fuse one step.

        A row that cannot be fused may only end, and the log says why: an error would end the engine
        with all its requests.

        Args:
            logits: ``(rows, vocab)``; not modified.
            rows: For each row, all ids of its text so far. A row with a placeholder
                cannot be fused.
            asked: How to fuse each row.

        Returns:
            ``(rows, vocab)`` log-probs in a new tensor, in the dtype of ``logits``.
        """
        result = only_end(logits, [self._end])
        unknown = {row for row, ids in enumerate(rows) if PLACEHOLDER in ids}
        if unknown:
            logger.error(
                "vLLM has not filled in the latest tokens of %d requests, so they cannot be fused "
                "and end here. Load the processor with --logits-processors, not as a plug-in, or "
                "start vLLM with --no-async-scheduling",
                len(unknown),
            )
        for name, processor in self._processors.items():
            mine = [
                row
                for row, each in enumerate(asked)
                if each.calibrator == name and row not in unknown
            ]
            if mine:
                result[mine] = fuse_or_end(
                    processor,
                    [rows[row] for row in mine],
                    logits[mine],
                    [asked[row].strength for row in mine],
                    [self._end],
                )
        return result


def _serve_metrics(port: int | None, parallel: Any) -> FusionMetrics | None:
    """Metrics of the worker whose rank is 0; those of other ranks would be the same."""
    if port is None or parallel.rank != 0:
        return None
    from fusion_detox.integrations.prometheus import serve

    metrics = FusionMetrics()
    # Each data-parallel engine serves its own.
    serve(metrics, port + parallel.data_parallel_index)
    return metrics
