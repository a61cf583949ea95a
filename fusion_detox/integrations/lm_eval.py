"""EleutherAI's lm-evaluation-harness scores the *fused* model: log-likelihoods and generation.

The harness finds models by name in a registry that it fills from itself alone: it reads no entry
points. Importing this module registers ``fusion-detox``. From Python::

    from fusion_detox.integrations.lm_eval import FusionLM

    lm_eval.simple_evaluate(FusionLM(pretrained="gpt2", strength=1.5), tasks=["lambada_openai"])

and on the command line, with all options of the harness's own::

    python -m fusion_detox.integrations.lm_eval run --model fusion-detox \
        --model_args pretrained=gpt2,calibrator=english-16k,strength=1.5 --tasks lambada_openai
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.lookup import DEFAULT_CALIBRATOR
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, MissingExtraError, ModelError
from fusion_detox.files.loading_errors import explained
from fusion_detox.processor import FusionLogitsProcessor

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as _error:
    # The harness does not require accelerate, but its Hugging Face model does.
    raise MissingExtraError((_error.name or "lm_eval").partition(".")[0], "lm-eval") from _error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Request = tuple[tuple[str, str], list[int], list[int]]
"""Texts of context and continuation, tokens of the context, tokens of the continuation."""

_SETTINGS = tuple(field.name for field in dataclasses.fields(FusionConfig))
_OWN_FILES = ("autogptq", "gguf_file", "gptqmodel")
"""Arguments of ``HFLM`` that read weights in other ways than ``from_pretrained`` does."""


@register_model("fusion-detox")
class FusionLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model (``hf``) with a calibrator fused into its logits.

    Every scored token has its log-prob under the fused distribution given all tokens before it,
    ``log_softmax(processor(ids[:, : t + 1], logits[:, t]))``; generation hands the processor to
    ``generate()``. At strength 0 all results are those of ``hf``. For weights of 16 bits give
    ``softmax_dtype="float32"``, or log-probs are rounded to 16 bits, as those of ``hf`` are. The
    harness's ``--use_cache`` knows requests, not settings: give each setting a file of its own.

    Args:
        pretrained: The target, a folder or hub id, or a loaded model (then give ``tokenizer``).
        calibrator: A ``Calibrator``, or the path, hub id or shipped name of one.
        config: Fusion settings, also as a dictionary of some; by default those that the
            calibrator recommends.
        **kwargs: Single fusion settings (``strength=1.5``, ``rule="product"``, …), which replace
            those of ``config``; and what ``hf`` takes (``tokenizer``, ``batch_size``, ``dtype``,
            ``max_length``, ``device``, …). The device is a GPU by default where there is one.

    Attributes:
        fusion: The processor in use.

    Raises:
        CalibratorNotFoundError: There is no such calibrator.
        CalibratorError: It cannot be used.
        ConfigError: A fusion setting is unknown or out of range, or remote code is asked for.
        ModelNotFoundError: There is no such target.
        ModelError: It cannot be loaded, or is an encoder-decoder model.
        VocabularyError: The two vocabularies cannot be mapped onto each other.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        calibrator: Calibrator | str = DEFAULT_CALIBRATOR,
        config: FusionConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        changes = {name: kwargs.pop(name) for name in _SETTINGS if name in kwargs}
        _check_arguments(pretrained, kwargs)
        # Before the target, which may take minutes to load.
        if isinstance(calibrator, str):
            calibrator = Calibrator.from_pretrained(calibrator)
        settings = _settings(config, calibrator.config, changes)
        if isinstance(pretrained, str):
            kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
            if not any(kwargs.get(name) for name in _OWN_FILES):
                kwargs.setdefault("use_safetensors", True)
            with explained(pretrained, "model", local_files_only=False):
                super().__init__(pretrained=pretrained, **kwargs)
        else:
            super().__init__(pretrained=pretrained, **kwargs)
        if self.backend != "causal":
            raise ModelError(
                f"{self.config.model_type} is an encoder-decoder model; give a causal language "
                "model such as GPT-2 or Llama"
            )
        # The harness has given the tokenizer a padding token by now.
        self.fusion = FusionLogitsProcessor(calibrator, self.tokenizer, settings, target=self.model)
        self._scored: dict[tuple[int, ...], int] = {}

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the target's facts and the fusion's."""
        info: dict[str, Any] = super().get_model_info()
        calibrator = self.fusion.calibrator
        info["fusion"] = {"calibrator": calibrator.name, "config": self.fusion.config.to_dict()}
        return info

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """The harness's own loop, with a note of what it is about to score.

        ``_model_call`` is told the model's inputs only, and to fuse at every position of a long
        context would cost many times more than at those that count.
        """
        self._scored = {}
        for _, context, continuation in requests:
            seen = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            self._scored[seen] = max(len(continuation), self._scored.get(seen, 0))
        try:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
        finally:
            self._scored = {}
        return found

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits ``(batch, length, vocab)``, fused at the positions that are scored."""
        logits: Tensor = super()._model_call(inps, attn_mask, labels)
        if self.softmax_dtype is not None:
            logits = logits.to(self.softmax_dtype)
        rows: list[list[int]] = inps.tolist()
        positions = [self._positions(row) for row in rows]
        # Soft prompts of an adapter come before the text.
        offset = logits.shape[1] - inps.shape[1]
        pad: int = self.tokenizer.pad_token_id
        for step in range(max(map(len, positions), default=0)):
            active = [row for row, found in enumerate(positions) if step < len(found)]
            at = [positions[row][step] for row in active]
            width = max(at) + 1
            # The processor knows padding on the left; it changes nothing but the width.
            prefixes = [
                [pad] * (width - 1 - last) + rows[row][: last + 1]
                for row, last in zip(active, at, strict=True)
            ]
            where = (torch.tensor(active), torch.tensor(at) + offset)
            logits[where] = self.fusion(torch.tensor(prefixes), logits[where])
        return logits

    def _positions(self, row: list[int]) -> list[int]:
        """Positions of a row of inputs, right padded with 0, whose logits are scored.

        Where a text itself ends in token 0, the row may stand for several requests. Then the
        positions of all are fused: a position depends on the tokens before it alone.
        """
        found: set[int] = set()
        for length in range(len(row), 0, -1):
            count = self._scored.get(tuple(row[:length]), 0)
            found.update(range(length - count, length))
            if row[length - 1] != 0:
                break
        return sorted(found)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        generation_kwargs["logits_processor"] = LogitsProcessorList([self.fusion])
        written: Tensor = super()._model_generate(
            context=context, max_length=max_length, stop=stop, **generation_kwargs
        )
        return written


def main(argv: Sequence[str] | None = None) -> None:
    """The harness's command line, which then knows ``--model fusion-detox``.

    Args:
        argv: Arguments without the program's name; those of the process by default.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *(before[1:] if argv is None else argv)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _check_arguments(pretrained: str | PreTrainedModel, kwargs: dict[str, Any]) -> None:
    if kwargs.get("trust_remote_code"):
        raise ConfigError(
            "trust_remote_code is not supported: no code from a model's repository is ever run; "
            "give a model that transformers knows by itself"
        )
    if kwargs.get("backend", "default") == "seq2seq":
        raise ConfigError("backend 'seq2seq' is not supported: fusion needs a causal model")
    unknown = sorted(set(kwargs) - set(inspect.signature(HFLM.__init__).parameters))
    for name in unknown:
        # The harness hands what it does not know to from_pretrained, or drops it.
        close = difflib.get_close_matches(name, _SETTINGS, n=1)
        if close or not isinstance(pretrained, str):
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"unknown argument {name!r}: {meant}Fusion settings are {', '.join(_SETTINGS)}; "
                "others are those of the harness's model 'hf'"
            )


def _settings(
    config: FusionConfig | dict[str, Any] | None, recommended: FusionConfig, changes: dict[str, Any]
) -> FusionConfig:
    if config is None:
        config = recommended
    elif isinstance(config, dict):
        config = FusionConfig.from_dict({**recommended.to_dict(), **config})
    elif not isinstance(config, FusionConfig):
        raise ConfigError(
            f"config must be a FusionConfig or a dictionary, not {config!r}; on a command line "
            "give single settings, such as strength=1.5"
        )
    return config.replace(**changes)


if __name__ == "__main__":
    main()
