"""Continuous batching in transformers: requests of several strengths in one batch.

python examples/serving/with_continuous_batching.py
python examples/serving/with_continuous_batching.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from fusion_detox import FusionLogitsProcessor
from fusion_detox.calibrator.lookup import demo_target_path
from fusion_detox.integrations.continuous_batching import generate_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo_target_path()), help="path or hub id")
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--prompt", default="Get out of here, you")
    parser.add_argument("--tokens", type=int, default=20)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    processor = FusionLogitsProcessor(args.calibrator, tokenizer)
    ids = tokenizer(args.prompt)["input_ids"]
    outputs = generate_batch(
        model,
        [ids, ids],
        processor,
        generation_config=GenerationConfig(do_sample=False, eos_token_id=tokenizer.eos_token_id),
        # By default, the cache takes most of the memory, which takes long on a CPU.
        continuous_batching_config=ContinuousBatchingConfig(
            use_async_batching=False, use_cuda_graph=False, num_blocks=64, max_batch_tokens=256
        ),
        max_new_tokens=args.tokens,
        strengths=[0.0, None],  # off, and the strength that the calibrator recommends
    )
    for name, output in zip(("without", "with"), outputs.values(), strict=True):
        print(f"{name} fusion: {args.prompt}{tokenizer.decode(output.generated_tokens)}")


if __name__ == "__main__":
    main()
