"""Hybrids of attention and recurrence (Falcon-H1, Jamba, Bamba) need no special treatment.

python examples/hybrid.py --model tiiuae/Falcon-H1-0.5B-Base
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="tiiuae/Falcon-H1-0.5B-Base", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Get out of here, you")
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
# The fast kernels are optional (pip install mamba-ssm causal-conv1d).
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=args.tokens, logits_processor=processors
    )
    print(f"{name} fusion: {tokenizer.decode(output[0], skip_special_tokens=True)}")
