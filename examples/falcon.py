"""Falcon: no BOS, no padding token; several samples of one prompt.

python examples/falcon.py --model tiiuae/falcon-rw-1b
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="tiiuae/falcon-rw-1b", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Get out of here, you")
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
# Without a padding token, generate() pads finished samples with the end-of-text token, which the
# processor reads as an end of text.
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    outputs = model.generate(
        **inputs,
        do_sample=True,
        top_p=0.9,
        num_return_sequences=3,
        max_new_tokens=args.tokens,
        pad_token_id=tokenizer.eos_token_id,
        logits_processor=processors,
    )
    for output in outputs:
        print(f"{name} fusion: {tokenizer.decode(output, skip_special_tokens=True)}")
