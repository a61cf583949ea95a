"""T5: an encoder-decoder; the processor sees only the decoder's ids.

python examples/t5.py --model google/flan-t5-small
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="google/flan-t5-small", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Continue: Get out of here, you")
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForSeq2SeqLM.from_pretrained(args.model)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)
# generate() passes only the decoder's ids to a processor. Pass the source separately, so that the
# calibrator reads it as a prompt; the line break ends it.
following = processor.following(f"{args.prompt}\n")

inputs = tokenizer(args.prompt, return_tensors="pt")
for name, processors in (("without", []), ("with", [following])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=args.tokens, logits_processor=processors
    )
    print(f"{name} fusion: {tokenizer.decode(output[0], skip_special_tokens=True)}")
