"""GPT-NeoX and Pythia: a head with more columns than the tokenizer has tokens.

python examples/gpt_neox.py --model EleutherAI/pythia-160m
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="EleutherAI/pythia-160m", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Get out of here, you")
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)
# Pythia's head is padded to a multiple of 128 (50304 columns for 50277 tokens). Fusion leaves the
# probability of the extra columns unchanged; nothing needs to be set.
columns = model.get_output_embeddings().weight.shape[0]
print(f"{columns} columns, {len(tokenizer)} tokens")

inputs = tokenizer(args.prompt, return_tensors="pt")
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=args.tokens, logits_processor=processors
    )
    print(f"{name} fusion: {tokenizer.decode(output[0], skip_special_tokens=True)}")
