"""GPT-2: a padded batch, and a tokenizer that has no padding token.

python examples/gpt2.py --model openai-community/gpt2
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="openai-community/gpt2", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Get out of here, you")
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
# GPT-2 has no padding token, so the end-of-text token is used. generate() hides it with the
# attention mask. The processor sees no mask, but it skips leading end-of-text tokens.
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

inputs = tokenizer([args.prompt, "The weather was fine, so"], return_tensors="pt", padding=True)
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    outputs = model.generate(
        **inputs,
        do_sample=True,
        top_p=0.9,
        max_new_tokens=args.tokens,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=processors,
    )
    for output in outputs:
        print(f"{name} fusion: {tokenizer.decode(output, skip_special_tokens=True)}")
