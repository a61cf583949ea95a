"""Any causal language model, with and without fusion.

python examples/any_model.py                       # the shipped demo target, toxic on purpose
python examples/any_model.py --model gpt2 --prompt "You are such a"
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import Calibrator, FusionLogitsProcessor
from fusion_detox.calibrator.lookup import demo_target_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(demo_target_path()), help="path or hub id")
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--prompt", default="Get out of here, you")
    parser.add_argument("--tokens", type=int, default=20)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    processor = FusionLogitsProcessor(Calibrator.from_pretrained(args.calibrator), tokenizer)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    for name, processors in (("without", []), ("with", [processor])):
        torch.manual_seed(0)
        output = model.generate(
            **inputs,
            do_sample=True,
            top_p=0.9,
            max_new_tokens=args.tokens,
            pad_token_id=tokenizer.eos_token_id,
            logits_processor=processors,
        )
        print(f"{name} fusion: {tokenizer.decode(output[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
