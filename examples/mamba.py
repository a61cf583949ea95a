"""Mamba: a recurrent state instead of a KV cache, with streaming.

python examples/mamba.py --model state-spaces/mamba-130m-hf
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="state-spaces/mamba-130m-hf", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Get out of here, you")
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
# Any target works, whatever its cache. As a calibrator, however, Mamba is rejected: a recurrent
# state cannot be rolled back, which assisted decoding and beam search require.
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

inputs = tokenizer(args.prompt, return_tensors="pt")
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    print(f"{name} fusion: ", end="")
    model.generate(
        **inputs,
        do_sample=True,
        top_p=0.9,
        max_new_tokens=args.tokens,
        logits_processor=processors,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
