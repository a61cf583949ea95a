"""OPT: the same token begins and ends a text.

python examples/opt.py --model facebook/opt-125m
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="facebook/opt-125m", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Get out of here, you")
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

# OPT puts </s>, its end-of-text token, before each prompt. After such a token the calibrator starts
# afresh, so it reads the prompt from its first word.
inputs = tokenizer(args.prompt, return_tensors="pt")
print(f"starts with {tokenizer.convert_ids_to_tokens(int(inputs['input_ids'][0, 0]))}")
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=args.tokens, logits_processor=processors
    )
    print(f"{name} fusion: {tokenizer.decode(output[0], skip_special_tokens=True)}")
