"""Fusion under the continuous batching of ``transformers`` 5, which takes no logits processors.

    from fusion_detox.integrations.continuous_batching import generate_batch

    outputs = generate_batch(model, prompts, processor, max_new_tokens=40)

or, for requests that come and go, ``attach(manager, processor)`` before ``manager.start()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_detox.errors import ConfigError, ModelError
from fusion_detox.processor import FusionLogitsProcessor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_NEEDED = "transformers 5.23 or later"


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    processor: FusionLogitsProcessor,
    *,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: Any = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """``model.generate_batch`` with fusion.

    Args:
        model: The target.
        prompts: Token ids of each prompt, without padding.
        processor: Fuses each request's next token.
        generation_config: How to decode; the model's own by default. What ``transformers`` does
            not support here (beams, stop strings, …) it ignores, as without fusion.
        continuous_batching_config: A ``ContinuousBatchingConfig``; with asynchronous batching and
            CUDA graphs off by default, as it must be.
        max_new_tokens: Most tokens to write; those of ``generation_config`` by default.

    Returns:
        The requests' outputs by their ids, in the order of ``prompts`` (several for each where
        ``num_return_sequences`` asks for them).

    Raises:
        ConfigError: See :func:`attach`.
        ModelError: A request failed; the message says why.
    """
    if not prompts:
        return {}
    if continuous_batching_config is None:
        continuous_batching_config = _synchronous()
    given: Any = model
    if not hasattr(given, "init_continuous_batching"):
        raise ConfigError(
            f"{type(model).__name__} has no init_continuous_batching(), which needs {_NEEDED}"
        )
    manager = given.init_continuous_batching(
        generation_config=generation_config, continuous_batching_config=continuous_batching_config
    )
    attach(manager, processor)
    try:
        manager.start()
        ids = manager.add_requests([list(prompt) for prompt in prompts], max_new_tokens)
        copies = manager.num_return_sequences
        found: dict[str, Any] = {}
        while len(found) < len(ids) * copies:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise ModelError(f"request {result.request_id} failed: {result.error}")
                found[result.request_id] = result
            elif result is None and not manager.is_running():
                raise ModelError(
                    f"continuous batching ended after {len(found)} of {len(ids) * copies} requests;"
                    " its log says why"
                )
    finally:
        manager.stop(block=True)
        manager.destroy()
    order = {name: place for place, name in enumerate(ids)}
    return dict(sorted(found.items(), key=lambda pair: order[pair[0].partition("__child#")[0]]))


def attach(manager: Any, processor: FusionLogitsProcessor) -> None:
    """Makes a manager fuse, from its start on.

    The processor comes where ``generate`` has it: before temperature, top-k and top-p. A request
    may ask for a strength of its own: ``manager.add_request(ids, strength=0.5)``.

    Args:
        manager: Of ``model.init_continuous_batching(…)``, not yet started.
        processor: What to fuse with.

    Raises:
        ConfigError: The manager has been started or warmed up, batches asynchronously, in CUDA
            graphs or compiled, or fuses already; or this ``transformers`` has no such manager.
    """
    if not hasattr(manager, "logit_processor"):
        raise ConfigError(
            f"{type(manager).__name__} is no manager of continuous batching: give that of "
            f"model.init_continuous_batching(), which needs {_NEEDED}"
        )
    if manager.is_running() or manager.batch_processor is not None:
        raise ConfigError(
            "the manager has been started or warmed up, and its first steps were not fused: call "
            "attach() right after init_continuous_batching()"
        )
    _check_plain(manager.continuous_batching_config)
    if processor.prompts_followed > 1:
        raise ConfigError(
            f"following() was given {processor.prompts_followed} texts, but here requests come in "
            "no fixed order: give one text for all, or put each text into its request's ids"
        )
    from transformers import LogitsProcessorList
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessorList,
    )

    old = manager.logit_processor
    steps = list(old.logits_processor)
    if any(getattr(step, "fuses", False) for step in steps):
        raise ConfigError("the manager fuses already: attach one processor")
    place = next((i for i, step in enumerate(steps) if _cuts(step)), len(steps))
    steps.insert(place, _adapter()(processor))
    new = ContinuousBatchingLogitsProcessorList(
        LogitsProcessorList(steps), per_request_processors=False, drop_unsupported_processors=False
    )
    new.tensors_required = old.tensors_required + 1
    manager.logit_processor = new


def _synchronous() -> Any:
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError as error:
        raise ConfigError(
            f"this version of transformers has no ContinuousBatchingConfig; it needs {_NEEDED}"
        ) from error
    return ContinuousBatchingConfig(use_async_batching=False, use_cuda_graph=False)


def _check_plain(config: Any) -> None:
    """Refuses what runs a step before its text is known, or without running Python."""
    compiled = config.varlen_compile_config or config.decode_compile_config
    if config.use_async_batching or any(config.cuda_graph_booleans) or compiled is not None:
        raise ConfigError(
            "asynchronous batching, CUDA graphs and compiled steps leave no place for a processor "
            "that reads text: pass continuous_batching_config=ContinuousBatchingConfig("
            "use_async_batching=False, use_cuda_graph=False)"
        )


def _cuts(step: object) -> bool:
    """Whether a processor is one of those that follow fusion in ``generate``."""
    name = type(step).__name__
    return name.endswith("Warper") or name in ("LogitNormalization", "WatermarkLogitsProcessor")


def _adapter() -> Any:
    """The class, made late: not every supported ``transformers`` has its base."""
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
    )

    class FusionForContinuousBatching(ContinuousBatchingLogitsProcessor):
        """Keeps the texts of the step that is prepared, and fuses its rows."""

        fuses = True
        supported_kwargs: dict[str, type] = {"strength": float}  # noqa: RUF012 - as in the base
        ignored_kwargs: tuple[str, ...] = ()

        def __init__(self, processor: FusionLogitsProcessor) -> None:
            self._processor = processor
            self._texts: list[list[int]] = []
            self._strengths: list[float] = []

        def fill_defaults(self, int32_tensor: Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
            """Called with the requests in the order of the rows of the scores to come."""
            states = [request.state for request in requests_with_new_token]
            # After a request was set back, its first tokens hold what it had written.
            self._texts = [[*state.initial_tokens, *state.generated_tokens] for state in states]
            self._strengths = [_strength(s.logit_processor_kwargs, self._processor) for s in states]
            return torch.zeros(len(states), dtype=torch.int32)

        def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
            result = scores.clone()  # rows beyond the requests are padding
            for strength in set(self._strengths):
                rows = [i for i, own in enumerate(self._strengths) if own == strength]
                fused = self._processor.with_settings(strength=strength)
                result[rows] = fused.fuse_rows([self._texts[i] for i in rows], scores[rows])
            return result

    return FusionForContinuousBatching


def _strength(options: Mapping[str, Any], processor: FusionLogitsProcessor) -> float:
    value: float = options.get("strength", processor.config.strength)
    return value
