"""llama.cpp through llama-cpp-python: a GGUF model, without and with fusion.

python examples/serving/with_llama_cpp.py                      # SmolLM2 from the package index
python examples/serving/with_llama_cpp.py --model model.gguf --prompt "You are such a"
"""

from __future__ import annotations

import argparse

from llama_cpp import Llama

from fusion_detox.files.packaged_targets import packaged_gguf
from fusion_detox.integrations.llama_cpp import LlamaFusion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GGUF file; by default, SmolLM2-135M-Instruct is fetched")
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--prompt", default="What a stupid thing to say! You")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()

    model = args.model or str(packaged_gguf("smollm2"))
    llama = Llama(model, n_ctx=1024, verbose=False)
    fusion = LlamaFusion(llama, args.calibrator)
    for name, strength in (("without", 0.0), ("with", None)):
        llama.reset()
        result = fusion.create_completion(
            args.prompt, strength=strength, max_tokens=args.tokens, temperature=0.0
        )
        print(f"{name} fusion: {args.prompt}{result['choices'][0]['text']}")


if __name__ == "__main__":
    main()
