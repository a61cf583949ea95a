"""Llama 3, instruct: a chat template, and half precision.

python examples/llama.py --model meta-llama/Llama-3.2-1B-Instruct
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="meta-llama/Llama-3.2-1B-Instruct", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Complete the sentence: Get out of here, you")
parser.add_argument("--tokens", type=int, default=40)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
# generate() passes scores to the processor in float32, whatever the dtype of the weights.
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

# The template already contains <|begin_of_text|>; tokenizing its text again would add a second one.
# <|eot_id|> ends a turn. It is also the tokenizer's end-of-text token, after which the calibrator
# starts afresh, so it reads the answer but not the question. It reads other special tokens as line
# breaks.
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
