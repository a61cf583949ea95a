"""The models whose speed `speed` measures: targets, and the processors that it compares.

Real targets are those of ``fusion_detox.files.packaged_targets``. The others are Llamas with random
weights, since time does not depend on what the weights are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from benchmarks import peer_methods as rules
from benchmarks.peer_training import RewardModel
from fusion_detox import Calibrator
from fusion_detox.files.models import load_target
from fusion_detox.files.packaged_targets import packaged_target

REAL = ("smollm2", "gemma3-270m", "qwen2.5-coder-0.5b")
# Hidden size, inner size, layers, heads, key heads; without the vocabulary, as in the names.
RANDOM = {
    "350M": (1024, 2736, 24, 16, 16),
    "1.1B": (2048, 5632, 22, 32, 4),
    "7B": (4096, 11008, 32, 32, 32),
}


def make_target(name: str, device: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A target and its tokenizer. Random targets have the vocabulary of SmolLM2."""
    if name in REAL:
        return load_target(
            str(packaged_target(name)), device=device, dtype=str(dtype).removeprefix("torch."),
            local_files_only=True,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(packaged_target("smollm2"))
    return _llama(RANDOM[name], len(tokenizer), device, dtype, longest=8192), tokenizer


def _llama(
    sizes: tuple[int, int, int, int, int], vocab: int, device: Any, dtype: torch.dtype, longest: int
) -> LlamaForCausalLM:
    hidden, inner, layers, heads, key_heads = sizes
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def full_cache(model: Any, batch: int, length: int) -> DynamicCache:
    """A cache of zeros in place of a prefill, which costs a plain and a fused run the same."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (batch, heads, length, width)
        empty = torch.zeros(shape, device=model.device, dtype=model.dtype)
        cache.update(empty, empty.clone(), layer)
    return cache


def moved_bytes(model: Any) -> int:
    """Bytes of the weights that one step reads: all except an untied input embedding."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        total -= embedding.numel() * embedding.element_size()
    return int(total)


class Uncached(LogitsProcessor):
    """A guide in the target's vocabulary that reads the whole text again at each step.

    So does the auxiliary model of AISteer360, now ``steerability``.
    """

    def __init__(self, guide: Any, pad: int) -> None:
        self._guide, self._pad = guide, pad

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids, mask = rules.pad_left(rules.unpadded(input_ids, self._pad), self._pad, scores.device)
        logits = self._guide(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
        return scores + logits


def peers(
    target: Any, tokenizer: Any, calibrator: Calibrator, pad: int
) -> dict[str, Callable[[], LogitsProcessor]]:
    """Other methods, made anew by each call, with untrained parts of the calibrator's size."""
    vocab, device, dtype = target.config.vocab_size, target.device, target.dtype
    # 7 million parameters, most of them the vocabulary.
    small = (96, 256, 4, 4, 4) if vocab < 100_000 else (32, 96, 4, 4, 4)

    @functools.cache
    def guide(_which: int) -> Any:
        return _llama(small, vocab, device, dtype, longest=8192)

    @functools.cache
    def reward() -> Any:
        model = calibrator.reference if calibrator.reference is not None else calibrator.clean
        return RewardModel(copy.deepcopy(model).float()).to(device).eval()

    def rad() -> LogitsProcessor:
        start = calibrator.bos_id
        return rules.Rad(reward(), calibrator.tokenizer, start, tokenizer, pad, 10.0)

    return {
        "DExperts, a cached pair of 7M": lambda: rules.DExperts(guide(0), guide(1), pad, 1.0, 0.9),
        "guide of 7M, not cached": lambda: Uncached(guide(0), pad),
        "RAD, 20 candidates": rad,
        "classifier-free guidance": lambda: UnbatchedClassifierFreeGuidanceLogitsProcessor(
            1.5, target
        ),
    }
