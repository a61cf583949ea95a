"""Score the *fused* model with EleutherAI's lm-evaluation-harness.

Importing this module registers the model ``fusion-detox``, because the harness reads no
entry points.
From Python::

    from fusion_detox.integrations.lm_eval import FusionLM

    lm_eval.simple_evaluate(FusionLM(pretrained="gpt2", strength=1.5), tasks=["lambada_openai"])

On the command line, which takes all options of the harness::

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
    # The missing module may be accelerate, which only the harness's Hugging Face model needs.
    raise MissingExtraError((_error.name or "lm_eval").partition(".")[0], "lm-eval") from _error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Request = tuple[tuple[str, str], list[int], list[int]]
"""``(context, continuation)`` as text, then the tokens of each."""

_SETTINGS = tuple(field.name for field in dataclasses.fields(FusionConfig))
_OTHER_FORMATS = ("autogptq", "gguf_file", "gptqmodel")
"""Arguments of ``HFLM`` that load weights from formats other than safetensors."""


@register_model("fusion-detox")
class FusionLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model (``hf``) with a calibrator fused into its logits.

    A token's log-prob is that of the fused distribution, given all tokens before it:
    ``log_softmax(processor(ids[:, : t + 1], logits[:, t]))``. Generation passes the processor to
    ``generate()``. With strength 0, all results equal those of ``hf``. With 16-bit weights, set
    ``softmax_dtype="float32"``; otherwise log-probs are rounded to 16 bits, like those of ``hf``.
    The harness's ``--use_cache`` ignores fusion settings, so use a separate file for each setting.

    Args:
        pretrained: The target: a folder, a hub id, or a loaded model (then give ``tokenizer``).
        calibrator: A ``Calibrator``, or the path, hub id or shipped name of one.
        config: Fusion settings, or a dictionary that overrides some of the calibrator's. By
            default, the settings that the calibrator recommends.
        **kwargs: Single fusion settings (``strength=1.5``, ``rule="product"``, …), which override
            those of ``config``; and arguments of ``hf`` (``tokenizer``, ``batch_size``, ``dtype``,
            ``max_length``, ``device``, …). The default device is a GPU if there is one.

    Attributes:
        fusion: The processor.

    Raises:
        CalibratorNotFoundError: The calibrator was not found.
        CalibratorError: The calibrator cannot be used.
        ConfigError: A fusion setting is unknown or out of range, or remote code is requested.
        ModelNotFoundError: The target was not found.
        ModelError: The target cannot be loaded, or is an encoder-decoder model.
        VocabularyError: The two vocabularies cannot be mapped.
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
        # Check these before loading the target, which may take minutes.
        if isinstance(calibrator, str):
            calibrator = Calibrator.from_pretrained(calibrator)
        settings = _settings(config, calibrator.config, changes)
        if isinstance(pretrained, str):
            kwargs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
            if not any(kwargs.get(name) for name in _OTHER_FORMATS):
                kwargs.setdefault("use_safetensors", True)
            with explained(pretrained, "model", local_files_only=False):
                super().__init__(pretrained=pretrained, **kwargs)
        else:
            super().__init__(pretrained=pretrained, **kwargs)
        if self.backend != "causal":
            raise ModelError(
                f"{self.config.model_type} is an encoder-decoder model: use a causal language "
                "model, such as GPT-2 or Llama"
            )
        # By now, the harness has set the tokenizer's padding token.
        self.fusion = FusionLogitsProcessor(calibrator, self.tokenizer, settings, target=self.model)
        self._scored: dict[tuple[int, ...], int] = {}

    def get_model_info(self) -> dict[str, Any]:
        """Return the facts that the harness stores with its results."""
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
        """Run the harness's loop, and record how many tokens of each input it scores.

        ``_model_call`` sees only the inputs, and fusing at every position of a long context
        would be many times slower than fusing at the scored positions.
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
        """Return logits ``(batch, length, vocab)``, fused at the scored positions."""
        logits: Tensor = super()._model_call(inps, attn_mask, labels)
        if self.softmax_dtype is not None:
            logits = logits.to(self.softmax_dtype)
        rows: list[list[int]] = inps.tolist()
        positions = [self._positions(row) for row in rows]
        # An adapter's soft prompts precede the text.
        offset = logits.shape[1] - inps.shape[1]
        pad: int = self.tokenizer.pad_token_id
        for step in range(max(map(len, positions), default=0)):
            active = [row for row, found in enumerate(positions) if step < len(found)]
            at = [positions[row][step] for row in active]
            width = max(at) + 1
            # The processor ignores padding on the left.
            prefixes = [
                [pad] * (width - 1 - last) + rows[row][: last + 1]
                for row, last in zip(active, at, strict=True)
            ]
            where = (torch.tensor(active), torch.tensor(at) + offset)
            logits[where] = self.fusion(torch.tensor(prefixes), logits[where])
        return logits

    def _positions(self, row: list[int]) -> list[int]:
        """The scored positions of a row of inputs, which is right-padded with 0.

        If a text ends in token 0, the row may belong to several requests. Then the positions of
        all are fused, which is safe, because a position depends only on the tokens before it.
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
    """Run the harness's command line, which then accepts ``--model fusion-detox``.

    Args:
        argv: Arguments without the program name; ``sys.argv[1:]`` by default.
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
            "trust_remote_code is not supported, because code from a model's repository is never "
            "run: use a model whose code is part of transformers"
        )
    if kwargs.get("backend", "default") == "seq2seq":
        raise ConfigError("backend 'seq2seq' is not supported: use a causal model")
    unknown = sorted(set(kwargs) - set(inspect.signature(HFLM.__init__).parameters))
    for name in unknown:
        # The harness passes unknown arguments to from_pretrained, or ignores them.
        close = difflib.get_close_matches(name, _SETTINGS, n=1)
        if close or not isinstance(pretrained, str):
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"unknown argument {name!r}: {meant}Use a fusion setting ({', '.join(_SETTINGS)}) "
                "or an argument of the harness's model 'hf'"
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
            f"config must be a FusionConfig or a dictionary, not {config!r}; on the command "
            "line, give single settings such as strength=1.5"
        )
    return config.replace(**changes)


if __name__ == "__main__":
    main()
