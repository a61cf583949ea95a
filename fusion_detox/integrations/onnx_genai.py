"""Fusion in ONNX Runtime GenAI, whose loop the caller runs.

    import onnxruntime_genai as og
    from fusion_detox.integrations.onnx_genai import generate

    model = og.Model("folder")
    outputs = generate(model, prompts, processor, max_new_tokens=40)

In a loop of your own, call ``fuse_logits(generator, processor, texts)`` before each
``generator.generate_next_token()``. The classes ``Engine`` and ``MtpGenerator`` have no
``set_logits``, so they cannot be fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion_detox.errors import ConfigError, DataError, MissingExtraError
from fusion_detox.integrations.steps import check_shared, fuse_array, strength_of
from fusion_detox.processor import FusionLogitsProcessor

try:
    import onnxruntime_genai as og
except ImportError as _error:
    raise MissingExtraError("onnxruntime-genai", "onnx-genai") from _error

__all__ = ["fuse_logits", "generate"]


def generate(
    model: og.Model,
    prompts: Sequence[Sequence[int]],
    processor: FusionLogitsProcessor,
    *,
    max_new_tokens: int,
    strengths: Sequence[float | None] | None = None,
    **search_options: Any,
) -> list[list[int]]:
    """Generate with fusion.

    Args:
        model: The target, an ``onnxruntime_genai.Model``.
        prompts: Token ids of each prompt, without padding.
        processor: Fuses the next token of each prompt. Its tokenizer must be the target's.
        max_new_tokens: Maximum number of new tokens of each prompt.
        strengths: The strength of each prompt; ``None`` stands for that of the processor.
        search_options: Those of ``GeneratorParams.set_search_options``, such as
            ``do_sample=True, temperature=0.7``.

    Returns:
        The new ids of each prompt, up to and including the id that ends its text.

    Raises:
        ConfigError: A strength is out of range, or their number is not that of the prompts, or
            there are several beams.
        DataError: A prompt is empty.
        VocabularyError: The scores are far wider than the tokenizer's vocabulary.
    """
    check_shared(processor, "ONNX Runtime GenAI", "strengths=[…]")
    strengths = [None] * len(prompts) if strengths is None else strengths
    if len(strengths) != len(prompts):
        raise ConfigError(
            f"{len(strengths)} strengths were given for {len(prompts)} prompts: pass one for each"
        )
    wanted = [strength_of(processor, each) for each in strengths]
    if search_options.get("num_beams", 1) != 1:
        raise ConfigError(
            "num_beams must be 1: the generator does not tell the text of each beam during a search"
        )
    if not all(map(len, prompts)):
        raise DataError("a prompt is empty: give each at least one token, such as the BOS token")
    if not prompts:
        return []
    tokenizer = og.Tokenizer(model)
    longest, ends = max(map(len, prompts)), set(map(int, tokenizer.eos_token_ids))
    options = {
        "do_sample": False,
        **search_options,
        "batch_size": len(prompts),
        "max_length": longest + max_new_tokens,
    }
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(**options)
    generator = og.Generator(model, parameters)
    # The generator pads a batch on the right, and new tokens follow the padding.
    pad = int(tokenizer.pad_token_id)
    rows = [[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts]
    generator.append_tokens(np.array(rows, dtype=np.int32))
    texts = [list(prompt) for prompt in prompts]
    done = [False] * len(prompts)
    while not generator.is_done():
        # A text that has ended gets padding, which nobody reads.
        active = [0.0 if over else each for over, each in zip(done, wanted, strict=True)]
        fuse_logits(generator, processor, texts, active)
        generator.generate_next_token()
        for row, id in enumerate(generator.get_next_tokens().tolist()):
            if not done[row]:
                texts[row].append(id)
                done[row] = id in ends
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def fuse_logits(
    generator: og.Generator,
    processor: FusionLogitsProcessor,
    texts: Sequence[Sequence[int]],
    strength: float | Sequence[float] | None = None,
) -> None:
    """Fuse the logits from which the generator chooses the next token.

    Args:
        generator: A generator to which the prompts were appended.
        processor: Fuses the next token of each row.
        texts: For each row, all ids of its text so far, without padding. (``get_sequence`` keeps
            the padding of a batch between the prompt and the new tokens.)
        strength: The strength, or one for each row; by default, that of the settings.

    Raises:
        ConfigError: There are several beams, or a strength is out of range.
        VocabularyError: The scores are far wider than the tokenizer's vocabulary.
    """
    logits: np.ndarray[Any, Any] = generator.get_logits()
    if len(logits) != len(texts):
        raise ConfigError(
            f"the generator has {len(logits)} rows of logits for {len(texts)} texts: give one text "
            "for each row, and use no beams"
        )
    last = logits[:, -1]
    fused = fuse_array(processor, texts, last, strength)
    result = np.array(logits)
    result[:, -1] = fused
    generator.set_logits(result)
