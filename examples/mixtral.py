"""Mixtral: experts distributed over all devices, in 4 bits if there is a GPU.

python examples/mixtral.py --model mistralai/Mixtral-8x7B-Instruct-v0.1
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fusion_detox import FusionLogitsProcessor

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument(
    "--model", default="mistralai/Mixtral-8x7B-Instruct-v0.1", help="hub id or folder"
)
parser.add_argument("--calibrator", default="english-16k")
parser.add_argument("--prompt", default="Complete the sentence: Get out of here, you")
parser.add_argument("--tokens", type=int, default=40)
args = parser.parse_args()

options = {"dtype": torch.bfloat16}
if torch.cuda.is_available():  # pip install accelerate bitsandbytes
    # The processor uses only logits, so quantized and distributed targets need nothing else.
    options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    options["device_map"] = "auto"
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, **options)
processor = FusionLogitsProcessor(args.calibrator, tokenizer)

inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": args.prompt}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
for name, processors in (("without", []), ("with", [processor])):
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_p=0.9, max_new_tokens=args.tokens, logits_processor=processors
    )
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(f"{name} fusion: {tokenizer.decode(answer, skip_special_tokens=True)}")
