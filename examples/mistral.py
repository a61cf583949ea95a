"""Mistral, instruct: SentencePiece, a sliding window, and a choice of device.

python examples/mistral.py --model mistralai/Mistral-7B-Instruct-v0.3
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--model", default="mistralai/Mistral-7B-Instruct-v0.3", help="hub id or folder"
)
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Complete the sentence: Get out of here, you")
parser.add_argument("--tokens", type=int, default=40)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
# The calibrator moves to the device of the scores; device="cpu" keeps it off a full GPU. The
# sliding window of Mistral 7B v0.1 does not affect the processor, which sees only ids.
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": args.prompt}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
).to(device)
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=args.tokens, logits_processor=processors
    )
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(f"{name} fusion: {tokenizer.decode(answer, skip_special_tokens=True)}")
