"""ONNX Runtime GenAI: a model exported by its builder, without and with fusion.

python examples/serving/with_onnx_genai.py                     # fetches SmolLM2 and exports it
python examples/serving/with_onnx_genai.py --onnx folder       # a model that is exported already
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile

import onnxruntime_genai as og

from fusion_detox import FusionLogitsProcessor
from fusion_detox.files.models import load_tokenizer
from fusion_detox.files.packaged_targets import packaged_target
from fusion_detox.integrations.onnx_genai import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of the target; by default, SmolLM2 is fetched")
    parser.add_argument("--onnx", help="folder of the exported target")
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--prompt", default="What a stupid thing to say! You")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = args.model or str(packaged_target("smollm2"))
        exported = args.onnx or folder
        if args.onnx is None:
            paths = ["-i", source, "-o", exported, "-c", f"{folder}/cache"]
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "target"]
            subprocess.run([*builder, *paths, "-p", "fp32", "-e", "cpu"], check=True)
        tokenizer = load_tokenizer(source)
        processor = FusionLogitsProcessor(args.calibrator, tokenizer)
        ids = tokenizer(args.prompt)["input_ids"]
        outputs = generate(
            og.Model(exported),
            [ids, ids],
            processor,
            max_new_tokens=args.tokens,
            strengths=[0, None],
        )
        for name, new in zip(("without", "with"), outputs, strict=True):
            print(f"{name} fusion: {args.prompt}{tokenizer.decode(new, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
