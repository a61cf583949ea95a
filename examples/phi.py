"""Phi-3 and Phi-4-mini: fusion with a limited effect per step.

python examples/phi.py --model microsoft/Phi-3-mini-4k-instruct
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="microsoft/Phi-3-mini-4k-instruct", help="hub id or folder")
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Complete the sentence: Get out of here, you")
parser.add_argument("--tokens", type=int, default=40)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
# An instruct model seldom needs full strength. kl_budget limits how far each step may move away
# from the target's own distribution, in nats.
processor = FusionLogitsProcessor(args.calibrator, tokenizer).with_settings(kl_budget=0.2)

inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": args.prompt}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=args.tokens, logits_processor=processors
    )
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(f"{name} fusion: {tokenizer.decode(answer, skip_special_tokens=True)}")
