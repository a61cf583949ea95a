"""Fusion in llama.cpp, through ``llama-cpp-python``.

from llama_cpp import Llama
from fusion_detox.integrations.llama_cpp import LlamaFusion

llama = Llama("model.gguf", n_ctx=2048)
fusion = LlamaFusion(llama)
llama("Once upon a time", **fusion.options())
llama.create_chat_completion(messages, **fusion.options(strength=1.5))
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.lookup import DEFAULT_CALIBRATOR
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, MissingExtraError, ModelError, VocabularyError
from fusion_detox.files.loading_errors import LOADING_ERRORS, first_line
from fusion_detox.integrations.steps import fuse_array, only_end, strength_of
from fusion_detox.processor import FusionLogitsProcessor, Verify
from fusion_detox.vocabulary.token_table import TokenTable

try:
    import llama_cpp
except ImportError as _error:
    raise MissingExtraError("llama-cpp-python", "llama-cpp") from _error

if TYPE_CHECKING:
    from llama_cpp import Llama

__all__ = ["LlamaFusion", "read_tokenizer"]

_Array = np.ndarray[Any, Any]


class LlamaFusion:
    """Fuses a calibrator into the logits of a ``llama_cpp.Llama``.

    One instance serves all calls of its ``Llama``, which runs one at a time. Results depend only on
    the text and the scores, so llama.cpp's own reuse of a prefix is safe. A draft model works.

    Args:
        llama: The target.
        calibrator: A ``Calibrator``, or the path, hub id or shipped name of one.
        config: Fusion settings; by default, those recommended by the calibrator.
        tokenizer: The target's tokenizer; by default, it is read from the GGUF file, which needs
            the package ``gguf``.
        device: Where the calibrator runs; the CPU by default.
        verify: See ``FusionLogitsProcessor``.

    Attributes:
        processor: The processor that this adapter calls.

    Raises:
        CalibratorError: The calibrator cannot be used.
        CalibratorNotFoundError: The calibrator was not found.
        ConfigError: The settings need the target's hidden states, which llama.cpp does not give.
        InertError: See ``verify``.
        MissingExtraError: ``gguf`` is not installed.
        ModelError: The tokenizer cannot be read from the GGUF file.
        VocabularyError: The tokenizer's tokens are not those of llama.cpp, or cannot be mapped.
    """

    def __init__(
        self,
        llama: Llama,
        calibrator: Calibrator | str = DEFAULT_CALIBRATOR,
        config: FusionConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
        verify: Verify = "raise",
    ) -> None:
        self._llama = llama
        if tokenizer is None:
            tokenizer = read_tokenizer(llama.model_path)
        _check_tokens(llama, TokenTable.from_tokenizer(tokenizer))
        self.processor = FusionLogitsProcessor(
            calibrator, tokenizer, config, device=device, verify=verify
        )

    def create_completion(
        self, *arguments: Any, strength: float | None = None, **named: Any
    ) -> Any:
        """``Llama.create_completion`` with fusion.

        Args:
            arguments: Those of the method.
            strength: The strength of this call; by default, that of the settings.
            named: Those of the method. Your own ``logits_processor`` run after fusion.

        Returns:
            What the method returns.

        Raises:
            ConfigError: The strength is out of range. Nothing was generated.
            FusionDetoxError: Fusion failed at a step. With ``stream=True``, this is raised at the
                end of the stream, which ends at that step.
        """
        return self._call(self._llama.create_completion, arguments, strength, named)

    def create_chat_completion(
        self, *arguments: Any, strength: float | None = None, **named: Any
    ) -> Any:
        """``Llama.create_chat_completion`` with fusion; see :meth:`create_completion`."""
        return self._call(self._llama.create_chat_completion, arguments, strength, named)

    def _call(
        self,
        method: Callable[..., Any],
        arguments: tuple[Any, ...],
        strength: float | None,
        named: dict[str, Any],
    ) -> Any:
        step = _Step(self._llama, self.processor, strength_of(self.processor, strength))
        named["logits_processor"] = _Processors([step, *(named.get("logits_processor") or ())])
        result = method(*arguments, **named)
        if isinstance(result, Iterator):
            return _checked(result, step)
        step.raise_error()
        return result


def read_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file holds.

    Args:
        path: The file.

    Raises:
        MissingExtraError: ``gguf`` is not installed.
        ModelError: The file is missing or damaged, or ``transformers`` does not know its
            architecture.
    """
    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ImportError as error:
        raise MissingExtraError("gguf", "llama-cpp") from error
    file = Path(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except (*LOADING_ERRORS, struct.error) as error:
        raise ModelError(
            f"the tokenizer of {file} cannot be read: {first_line(error)}. Pass tokenizer=, the "
            "tokenizer of the model that the file was converted from"
        ) from error
    return tokenizer


class _Processors(llama_cpp.LogitsProcessorList):  # type: ignore[misc]
    """With ``logit_bias``, the engine uses what ``extend`` returns, which for lists is ``None``."""

    def extend(self, more: Any) -> _Processors:
        return _Processors([*self, *more])


class _Step:
    """The logits processor of one call: ``(input_ids, scores) -> scores``."""

    def __init__(self, llama: Llama, processor: FusionLogitsProcessor, strength: float) -> None:
        self._llama, self._processor, self._strength = llama, processor, strength
        self._error: Exception | None = None

    def __call__(self, input_ids: _Array, scores: _Array) -> _Array:
        if self._error is None:
            try:
                length = _length(self._llama, scores) if self._llama.draft_model else len(input_ids)
                row = input_ids[:length].tolist()
                fused = fuse_array(self._processor, [row], scores[None], self._strength)
                return cast("_Array", fused[0])
            except Exception as error:  # noqa: BLE001 - raised after the call
                # ctypes drops an error that is raised here, and the text would go on unfused.
                self._error = error
        end = only_end(torch.from_numpy(np.array(scores)), [self._llama.token_eos()])
        return cast("_Array", end.numpy())

    def raise_error(self) -> None:
        """Raises the error that ended the text, if there was one."""
        if self._error is not None:
            raise self._error


def _checked(stream: Iterator[Any], step: _Step) -> Iterator[Any]:
    yield from stream
    step.raise_error()


def _length(llama: Llama, scores: _Array) -> int:
    """How many ids precede the token that these scores are for.

    With a draft model, the engine evaluates a draft at once, samples at each of its positions, and
    always passes all ids. It keeps the logits of all positions, which tell where these come from.
    """
    kept = llama.scores[: llama.n_tokens]
    same = np.flatnonzero((kept[:, :16] == scores[:16]).all(axis=1))
    found = [int(row) for row in same if np.array_equal(kept[row], scores)]
    if len(found) != 1:
        raise ConfigError(
            f"with a draft model, these scores match the logits of {len(found)} positions, but "
            "must match those of one: put no other logits processor before the fusion"
        )
    return found[0] + 1


def _check_tokens(llama: Llama, table: TokenTable) -> None:
    """Compare the table with llama.cpp's own text of every token.

    Raises:
        VocabularyError: They differ.
    """
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    size = llama.n_vocab()
    if len(table.token_bytes) > size:
        raise VocabularyError(
            f"the tokenizer has {len(table.token_bytes)} tokens, but the model in "
            f"{llama.model_path} has {size}: pass the tokenizer of this model"
        )
    buffer = ctypes.create_string_buffer(1 << 16)
    for id, text in enumerate(table.token_bytes):
        if text is None:
            continue
        count = llama_cpp.llama_token_to_piece(vocab, id, buffer, len(buffer), 0, True)
        if buffer.raw[: max(count, 0)] != text:
            raise VocabularyError(
                f"token {id} is {text!r} in the tokenizer, but {buffer.raw[: max(count, 0)]!r} in "
                f"{llama.model_path}: pass the tokenizer of this model"
            )
