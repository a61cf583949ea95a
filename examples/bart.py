"""BART: sources of different lengths, padded on the right; each gets its own prompt.

python examples/bart.py --model facebook/bart-large-cnn
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="facebook/bart-large-cnn", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument(
    "--prompt", default="You are an idiot and nobody wants to hear your stupid opinion."
)
parser.add_argument("--tokens", type=int, default=20)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForSeq2SeqLM.from_pretrained(args.model)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)
# An encoder counts positions from the left, so BART's tokenizer pads on the right. Give the
# calibrator one text per prompt, regardless of the number of beams.
sources = [args.prompt, "The weather was fine, so we walked to the river and had lunch there."]
following = processor.following([f"{source}\n" for source in sources])

inputs = tokenizer(sources, return_tensors="pt", padding=True)
for name, processors in (("without", []), ("with", [following])):
    outputs = model.generate(
        **inputs, num_beams=2, max_new_tokens=args.tokens, logits_processor=processors
    )
    for output in outputs:
        print(f"{name} fusion: {tokenizer.decode(output, skip_special_tokens=True)}")
