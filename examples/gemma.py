"""Gemma 2 and 3, instruct: soft-capped logits, and why not float16.

python examples/gemma.py --model google/gemma-3-270m-it
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google/gemma-3-270m-it", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Complete the sentence: Get out of here, you")
parser.add_argument("--tokens", type=int, default=40)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
# Use bfloat16: in float16, Gemma's activations overflow, and rows with NaN are returned unfused.
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
# Gemma 2 soft-caps its logits at 30 before the processor sees them. Fusion works on log-probs, so
# nothing needs to be set, and strengths mean the same as for any other target.
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": args.prompt}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=args.tokens, logits_processor=processors
    )
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(f"{name} fusion: {tokenizer.decode(answer, skip_special_tokens=True)}")
