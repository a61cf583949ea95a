"""Qwen: no BOS token, a padded head, and a template with optional thinking.

python examples/qwen.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Complete the sentence: Get out of here, you")
parser.add_argument("--tokens", type=int, default=40)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

# Qwen has no BOS token; the calibrator puts its own BOS before the text.
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": args.prompt}],
    add_generation_prompt=True,
    enable_thinking=False,  # otherwise thoughts would be fused too
    return_dict=True,
    return_tensors="pt",
)
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_k=20, max_new_tokens=args.tokens, logits_processor=processors
    )
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(f"{name} fusion: {tokenizer.decode(answer, skip_special_tokens=True)}")
