"""Fusion in MLX-LM, as a logits processor.

    from mlx_lm import generate, load
    from fusion_detox.integrations.mlx_lm import MLXFusion

    model, tokenizer = load("folder")
    prompt = tokenizer.encode("Once upon a time")
    generate(model, tokenizer, prompt, logits_processors=[MLXFusion(processor, prompt)])

The server of MLX-LM (``mlx_lm.server``) takes only its built-in logits processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from fusion_detox.errors import ConfigError, DataError, MissingExtraError
from fusion_detox.integrations.steps import check_shared, fuse_array, strength_of
from fusion_detox.processor import FusionLogitsProcessor

try:
    import mlx.core as mx
except ImportError as _error:
    raise MissingExtraError("mlx", "mlx-lm") from _error

__all__ = ["MLXFusion"]


class MLXFusion:
    """The logits processor of one request: ``(tokens, logits) -> logits``.

    With a draft model, and in versions before 0.32, MLX-LM shows a processor only the end of the
    prompt. So the request's prompt is given here. Drafts are fused as well, so more are accepted.

    Args:
        processor: Fuses the next token. Its tokenizer must be the target's.
        prompt: All ids of the request's prompt, with those behind a ``prompt_cache``.
        strength: The strength of this request; by default, that of the processor.

    Raises:
        ConfigError: The strength is out of range, or the processor has several strengths or texts.
        DataError: The prompt is empty.
    """

    def __init__(
        self,
        processor: FusionLogitsProcessor,
        prompt: Sequence[int],
        strength: float | None = None,
    ) -> None:
        check_shared(processor, "MLX-LM", "MLXFusion(processor, prompt, strength=0.5)")
        self._prompt = [int(id) for id in prompt]
        if not self._prompt:
            raise DataError("the prompt is empty: give at least one token, such as the BOS token")
        self._processor, self._strength = processor, strength_of(processor, strength)
        self._hidden: int | None = None  # ids of the prompt that the engine does not show

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Fuse one step.

        Args:
            tokens: ``(length,)`` ids of the text so far, with or without the prompt's beginning.
            logits: ``(1, vocab)``; not modified.

        Returns:
            ``(1, vocab)`` log-probs in the dtype of ``logits``.

        Raises:
            ConfigError: The text does not begin with the prompt.
            DataError: There are several rows of logits.
            VocabularyError: The scores are far wider than the tokenizer's vocabulary.
        """
        shown = cast("list[int]", tokens.tolist())
        if self._hidden is None:
            self._hidden = max(0, len(self._prompt) - len(shown))
        tail = self._prompt[self._hidden :]
        if shown[: len(tail)] != tail:
            raise ConfigError(
                f"the text begins with the ids {shown[:5]}, but the prompt given to MLXFusion ends "
                f"in {tail[-5:]}: make one MLXFusion for each request, and give it the same ids"
            )
        # numpy has no bfloat16.
        scores: np.ndarray[Any, Any] = np.array(logits.astype(mx.float32))
        row = [*self._prompt[: self._hidden], *shown]
        return mx.array(fuse_array(self._processor, [row], scores, self._strength)).astype(
            logits.dtype
        )
