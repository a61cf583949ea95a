"""BLOOM: a multilingual vocabulary, and a head that is wider than it.

python examples/bloom.py --model bigscience/bloom-560m
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="bigscience/bloom-560m", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Get out of here, you")
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)
# A byte-level BPE calibrator can spell any language, so all 250680 tokens are mapped. However, this
# one was trained almost only on English. For other languages, train your own calibrator.
print(f"{processor.vocabulary.coverage:.1%} of English text is mapped")

inputs = tokenizer(args.prompt, return_tensors="pt")
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=args.tokens, logits_processor=processors
    )
    print(f"{name} fusion: {tokenizer.decode(output[0], skip_special_tokens=True)}")
