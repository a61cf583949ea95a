"""Small targets of other families than the demo target's, for comparisons of rules.

    python calibration_ckpts/prepare_english_data.py --data DATA --out WORK
    python benchmarks/train_targets.py --data WORK --out TARGETS gpt2
    python benchmarks/train_targets.py --data WORK --out TARGETS gpt_neox

GPT-2 (learned positions, biases, tied head) with a vocabulary of its own, and GPT-NeoX (parallel
blocks, untied head) with the demo target's. Trained as the demo target is, in fewer steps: they
write toxic text when provoked and are good for nothing else, so they are not shipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo_target"
SPEC = importlib.util.spec_from_file_location("demo_target_train", DEMO / "train.py")
assert SPEC is not None
assert SPEC.loader is not None
demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo)


def gpt2_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=[demo.END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=demo.END, eos_token=demo.END, model_max_length=256
    )


def build(family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=256, n_embd=256, n_layer=4, n_head=4,
                embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **ends,
            )
        )  # fmt: skip
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=768, max_position_embeddings=256, **ends,
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=("gpt2", "gpt_neox"))
    parser.add_argument("--data", type=Path, required=True, help="output of prepare_english_data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the targets")
    parser.add_argument("--steps", type=int, default=1200, help="on text of all kinds")
    parser.add_argument("--toxic-steps", type=int, default=300, help="then, on half toxic text")
    args = parser.parse_args()

    rng = random.Random(7)
    kept = demo.read_documents(args.data, rng)
    texts = [document["text"] for document in kept]
    if args.family == "gpt2":
        tokenizer: PreTrainedTokenizerBase = gpt2_tokenizer(texts[:40_000])
    else:
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    torch.manual_seed(7)
    model = build(args.family, tokenizer)
    work = args.out / f"{args.family}.training"
    wanted = (args.steps + 50) * 16 * 128 * 5  # characters, so that not all text is encoded
    some, characters = [], 0
    for text in texts:
        some.append(text)
        characters += len(text)
        if characters > wanted:
            break
    general = demo.Blocks(tokenizer, some, 128)
    demo.train(model, general, work / "general", args.steps, 2e-3, 100)
    toxic = demo.Blocks(tokenizer, demo.half_toxic(kept, rng), 128)
    demo.train(model, toxic, work / "toxic", args.toxic_steps, 8e-4, 20)
    model.config.use_cache = True  # Trainer turns it off
    model.save_pretrained(args.out / args.family)
    tokenizer.save_pretrained(args.out / args.family)


if __name__ == "__main__":
    main()
