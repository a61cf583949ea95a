"""Fusion with the continuous batching of ``transformers`` 5, which takes no logits processors.

    from fusion_detox.integrations.continuous_batching import generate_batch

    outputs = generate_batch(model, prompts, processor, max_new_tokens=40)

To add requests while others run, call ``attach(manager, processor)`` before ``manager.start()``.
Each request may then set its own strength: ``manager.add_request(ids, strength=0.5)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_detox.errors import ConfigError, ModelError
from fusion_detox.integrations.steps import check_shared, strength_of
from fusion_detox.processor import FusionLogitsProcessor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

__all__ = ["attach", "generate_batch"]

_NEEDED = "continuous batching needs transformers 5.23 or later"


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    processor: FusionLogitsProcessor,
    *,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: Any = None,
    max_new_tokens: int | None = None,
    strengths: Sequence[float | None] | None = None,
) -> dict[str, Any]:
    """Call ``model.generate_batch`` with fusion.

    Args:
        model: The target.
        prompts: Token ids of each prompt, without padding.
        processor: Fuses the next token of each request.
        generation_config: Decoding settings; the model's own by default. Settings that
            ``transformers`` does not support here (beams, stop strings, …) are ignored, as they
            are without fusion.
        continuous_batching_config: A ``ContinuousBatchingConfig``. By default, asynchronous
            batching and CUDA graphs are off, as fusion requires.
        max_new_tokens: Maximum number of new tokens; that of ``generation_config`` by default.
        strengths: The strength of each prompt; ``None`` stands for that of the processor.

    Returns:
        The outputs by request id, in the order of ``prompts``. With ``num_return_sequences``, there
        are several per prompt.

    Raises:
        ConfigError: See :func:`attach`. Or a strength is out of range, or their number is not that
            of the prompts.
        ModelError: A request failed; the message gives the reason.
    """
    if strengths is None:
        strengths = [None] * len(prompts)
    if len(strengths) != len(prompts):
        raise ConfigError(
            f"{len(strengths)} strengths were given for {len(prompts)} prompts: pass one for each"
        )
    wanted_strengths = [strength_of(processor, each) for each in strengths]
    if not prompts:
        return {}
    untyped: Any = model
    if not hasattr(untyped, "init_continuous_batching"):
        raise ConfigError(
            f"{type(model).__name__} has no init_continuous_batching(): {_NEEDED} and a model "
            "that supports it"
        )
    if continuous_batching_config is None:
        try:
            from transformers import ContinuousBatchingConfig
        except ImportError as error:
            raise ConfigError(f"transformers has no ContinuousBatchingConfig: {_NEEDED}") from error
        continuous_batching_config = ContinuousBatchingConfig(
            use_async_batching=False, use_cuda_graph=False
        )
    manager = untyped.init_continuous_batching(
        generation_config=generation_config, continuous_batching_config=continuous_batching_config
    )
    attach(manager, processor)
    try:
        manager.start()
        ids = _add(manager, prompts, wanted_strengths, max_new_tokens)
        wanted = len(ids) * manager.num_return_sequences
        found: dict[str, Any] = {}
        while len(found) < wanted:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise ModelError(f"request {result.request_id} failed: {result.error}")
                found[result.request_id] = result
            elif result is None and not manager.is_running():
                raise ModelError(
                    f"continuous batching stopped after {len(found)} of {wanted} requests; the log "
                    "of transformers gives the reason"
                )
    finally:
        manager.stop(block=True)
        manager.destroy()
    order = {name: place for place, name in enumerate(ids)}
    return dict(sorted(found.items(), key=lambda pair: order[pair[0].partition("__child#")[0]]))


def _add(
    manager: Any,
    prompts: Sequence[Sequence[int]],
    strengths: Sequence[float],
    max_new_tokens: int | None,
) -> list[str]:
    """Add the requests, and return their ids in the order of the prompts."""
    ids = [""] * len(prompts)
    for strength in dict.fromkeys(strengths):
        places = [place for place, each in enumerate(strengths) if each == strength]
        rows = [list(prompts[place]) for place in places]
        names = manager.add_requests(rows, max_new_tokens, strength=strength)
        for place, name in zip(places, names, strict=True):
            ids[place] = name
    return ids


def attach(manager: Any, processor: FusionLogitsProcessor) -> None:
    """Add fusion to a continuous-batching manager.

    As in ``generate``, fusion runs before temperature, top-k and top-p. A request may set its own
    strength: ``manager.add_request(ids, strength=0.5)``; with 0, it is not fused. A strength that
    is not a number within range fails that request alone: its result has the status ``FAILED`` and
    the reason as its ``error``.

    Args:
        manager: The result of ``model.init_continuous_batching(…)``, not yet started.
        processor: The processor to add.

    Raises:
        ConfigError: The manager was started or warmed up, already fuses, or uses asynchronous
            batching, CUDA graphs or compilation; or this version of ``transformers`` has no
            suitable manager.
    """
    if not hasattr(manager, "logit_processor"):
        raise ConfigError(
            f"{type(manager).__name__} is not a continuous-batching manager: pass the result of "
            f"model.init_continuous_batching(); {_NEEDED}"
        )
    if manager.is_running() or manager.batch_processor is not None:
        raise ConfigError(
            "the manager was already started or warmed up, so its first steps were not fused: call "
            "attach() right after init_continuous_batching()"
        )
    config = manager.continuous_batching_config
    compiled = config.varlen_compile_config or config.decode_compile_config
    if config.use_async_batching or any(config.cuda_graph_booleans) or compiled is not None:
        raise ConfigError(
            "fusion reads the text at each step, which is impossible with asynchronous batching, "
            "CUDA graphs or compiled steps: pass continuous_batching_config="
            "ContinuousBatchingConfig(use_async_batching=False, use_cuda_graph=False)"
        )
    check_shared(processor, "continuous batching", "manager.add_request(ids, strength=0.5)")
    from transformers import LogitsProcessorList
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessorList,
    )

    old = manager.logit_processor
    steps = list(old.logits_processor)
    if any(getattr(step, "fuses", False) for step in steps):
        raise ConfigError("the manager already has a fusion processor: attach only one")
    place = next((i for i, step in enumerate(steps) if _follows_fusion(step)), len(steps))
    steps.insert(place, _adapt(processor))

    class Checked(ContinuousBatchingLogitsProcessorList):
        """The list of processors, which the manager asks about each new request."""

        def check_kwargs(self, kwargs: dict[str, Any]) -> None:
            # An error in here fails this request alone; later, it would end all of them.
            others = dict(kwargs)
            strength_of(processor, others.pop("strength", None))
            super().check_kwargs(others)

    new = Checked(
        LogitsProcessorList(steps), per_request_processors=False, drop_unsupported_processors=False
    )
    new.tensors_required = old.tensors_required + 1
    manager.logit_processor = new


def _follows_fusion(step: object) -> bool:
    """Whether a processor comes after fusion in ``generate``."""
    name = type(step).__name__
    return name.endswith("Warper") or name in ("LogitNormalization", "WatermarkLogitsProcessor")


def _adapt(processor: FusionLogitsProcessor) -> Any:
    # Some supported versions of transformers lack the base class, so it is imported late.
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
    )

    class FusionForContinuousBatching(ContinuousBatchingLogitsProcessor):
        """Stores the texts of the step that is being prepared, then fuses its scores."""

        fuses = True
        supported_kwargs: dict[str, type] = {"strength": float}  # noqa: RUF012 - as in the base
        ignored_kwargs: tuple[str, ...] = ()

        def __init__(self) -> None:
            self._texts: list[list[int]] = []
            self._strengths: list[float] = []

        def fill_defaults(self, int32_tensor: Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
            """Receive the requests in the order of the rows of scores that follow."""
            states = [request.state for request in requests_with_new_token]
            # A preempted request starts again: what it has generated moves to its initial tokens.
            self._texts = [[*state.initial_tokens, *state.generated_tokens] for state in states]
            self._strengths = [
                strength_of(processor, state.logit_processor_kwargs.get("strength"))
                for state in states
            ]
            return torch.zeros(len(states), dtype=torch.int32)

        def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
            result = scores.clone()  # rows beyond the requests are padding
            count = len(self._texts)
            result[:count] = processor.fuse_rows(self._texts, scores[:count], self._strengths)
            return result

    return FusionForContinuousBatching()
