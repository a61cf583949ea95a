r"""Measure the cost of fusion: time per step of plain and of fused ``generate()``.

    python -m benchmarks.speed --calibrator english-16k --tokenizer ../shared/tokenizers/gpt2 \
        --text WORK/test_general.jsonl

Targets are Llamas of about 10, 100 and 350 million parameters with random weights. Because these
would not write words, both runs are forced to write the tokens of a real text. The target's cache
starts filled with zeros instead of a prefill, which would be the same for both and take most of the
time. The bound is the cost of reading the weights alone: (target + calibrator) / target bytes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fusion_detox import Calibrator, FusionLogitsProcessor

err = Console(stderr=True)
# Hidden size, layers, heads; the sizes in the names do not include the vocabulary.
TARGETS = {"10M": (160, 6, 4), "100M": (768, 8, 12), "350M": (1024, 24, 16)}


class Forced(LogitsProcessor):
    """Forces a given text, regardless of the scores."""

    def __init__(self, texts: Tensor) -> None:
        self.texts = texts
        self.rows = torch.arange(len(texts))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores[self.rows, self.texts[:, input_ids.shape[1]]] = 1e4
        return scores


class Clock(StoppingCriteria):
    """Records when each token is finished."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def steps(self) -> list[float]:
        """Seconds of each step except the first, which includes preparation."""
        return [b - a for a, b in pairwise(self.times[1:])]

    def first(self) -> float:
        return self.times[1] - self.times[0]


def build_target(name: str, vocabulary: int) -> LlamaForCausalLM:
    hidden, layers, heads = TARGETS[name]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    ).eval()


def full_cache(model: LlamaForCausalLM, batch: int, length: int) -> DynamicCache:
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    empty = torch.zeros(batch, config.num_key_value_heads, length, width)
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        cache.update(empty.clone(), empty.clone(), layer)
    return cache


@torch.inference_mode()
def timed(
    model: LlamaForCausalLM, processor: Any, texts: Tensor, context: int, tokens: int
) -> Clock:
    ids = texts[:, :context]
    cache = full_cache(model, len(ids), context - 1)
    processors = [processor, Forced(texts)] if processor else [Forced(texts)]
    clock = Clock()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock


def moved_bytes(model: Any) -> int:
    """Bytes of the weights read per step: all except an untied input embedding."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        weight = model.get_input_embeddings().weight
        total -= weight.numel() * weight.element_size()
    return int(total)


def milliseconds(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1000, 3)


def measure_cell(
    model: Any, processor: Any, texts: Tensor, context: int, args: argparse.Namespace
) -> dict[str, Any]:
    for warm in (None, processor):
        timed(model, warm, texts, context, 3)
    plain, fused, first_plain, first_fused = [], [], [], []
    began, repeats = time.perf_counter(), 0
    while repeats < args.repeats and (
        repeats == 0 or time.perf_counter() - began < args.cell_seconds
    ):
        processor.reset()  # each repeat reads the context again, like a new text
        for used, steps, first in ((None, plain, first_plain), (processor, fused, first_fused)):
            clock = timed(model, used, texts, context, args.tokens)
            steps += clock.steps()
            first.append(clock.first())
        repeats += 1
    return {
        "plain_ms": milliseconds(plain),
        "fused_ms": milliseconds(fused),
        "ratio": round(statistics.median(fused) / statistics.median(plain), 3),
        "first_step_plain_ms": milliseconds(first_plain),
        "first_step_fused_ms": milliseconds(first_fused),
        "repeats": repeats,
        "steps": len(fused),
    }


@torch.inference_mode()
def flatness(processor: Any, texts: Tensor, context: int, vocabulary: int) -> dict[str, Any]:
    """Time of the processor alone at a given context, over 16 steps after the first."""
    scores = torch.randn(len(texts), vocabulary, generator=torch.Generator().manual_seed(0))
    processor.reset()
    times = []
    for length in range(context, context + 17):
        began = time.perf_counter()
        processor(texts[:, :length], scores)
        times.append(time.perf_counter() - began)
    return {
        "context": context,
        "batch": len(texts),
        "first_ms": round(times[0] * 1000, 3),
        "step_ms": milliseconds(times[1:]),
    }


def rows_of_text(tokenizer: Any, path: Path, rows: int, length: int) -> Tensor:
    """Consecutive slices of the texts in a JSON Lines file, ``(rows, length)`` tokens."""
    ids: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"] + "\n", verbose=False)["input_ids"]
            if len(ids) >= rows * length:
                return torch.tensor(ids[: rows * length]).view(rows, length)
    raise SystemExit(
        f"{path} has {len(ids)} tokens, but {rows * length} are needed: give more text"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibrator", required=True)
    parser.add_argument("--tokenizer", required=True, help="tokenizer of the targets")
    parser.add_argument("--text", type=Path, required=True, help='JSON Lines with "text"')
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--contexts", nargs="+", type=int, default=[32, 512])
    parser.add_argument("--flat-contexts", nargs="+", type=int, default=[32, 128, 512, 1024])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5, help="maximum repeats per cell")
    parser.add_argument(
        "--cell-seconds", type=float, default=15, help="start no further repeat after this time"
    )
    parser.add_argument("--threads", type=int, default=2)
    default_out = Path(__file__).parent / "results" / "speed.json"
    parser.add_argument("--out", type=Path, default=default_out)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    calibrator = Calibrator.from_pretrained(args.calibrator)
    processor = FusionLogitsProcessor(calibrator, tokenizer)
    longest = max(*args.contexts, *args.flat_contexts) + max(args.tokens, 17) + 1
    texts = rows_of_text(tokenizer, args.text, max(*args.batches, 8), longest)
    calibrators = [m for m in (calibrator.clean, calibrator.reference) if m is not None]
    calibrator_bytes = sum(map(moved_bytes, calibrators))

    flat = [flatness(processor, texts[:8], c, len(tokenizer)) for c in args.flat_contexts]
    for row in flat:
        print(f"processor alone, batch 8, context {row['context']:>4}: {row['step_ms']:.2f} ms")
    cells: list[dict[str, Any]] = []
    for name in args.targets:
        model = build_target(name, len(tokenizer))
        bound = (moved_bytes(model) + calibrator_bytes) / moved_bytes(model)
        for context in args.contexts:
            for batch in args.batches:
                cell = {
                    "target": name,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "batch": batch,
                    "context": context,
                    **measure_cell(model, processor, texts[:batch], context, args),
                    "bound": round(bound, 3),
                }
                cells.append(cell)
                print(
                    f"{name:>5} batch {batch:>2} context {context:>4}: plain {cell['plain_ms']:.1f}"
                    f" ms, fused {cell['fused_ms']:.1f} ms, ratio {cell['ratio']:.3f}"
                    f" (bound {bound:.3f})",
                    flush=True,
                )
    document = {
        "setup": {
            "calibrator": Path(args.calibrator).name,
            "calibrator_bytes": calibrator_bytes,
            "config": processor.config.to_dict(),
            "map": processor.vocabulary.kind,
            "vocabulary": len(tokenizer),
            "tokens": args.tokens,
            "threads": args.threads,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("torch", "transformers", "tokenizers")
            },
        },
        "cells": cells,
        "processor_alone": flat,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, args.out)
    err.print(f"written: {args.out}")


if __name__ == "__main__":
    main()
