"""MPT: ALiBi positions; beam search instead of sampling.

python examples/mpt.py --model mosaicml/mpt-7b
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="mosaicml/mpt-7b", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Get out of here, you")
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
for name, processors in (("without", []), ("with", [processor])):
    # Beams are ranked by fused log-probs. One processor handles all of them and needs no reset.
    output = model.generate(
        **inputs, num_beams=4, max_new_tokens=args.tokens, logits_processor=processors
    )
    print(f"{name} fusion: {tokenizer.decode(output[0], skip_special_tokens=True)}")
