"""Train small targets of two more model families, for comparing fusion rules.

    python -m recipes.english_data --data DATA --out WORK
    python -m benchmarks.train_targets --data WORK --out TARGETS gpt2
    python -m benchmarks.train_targets --data WORK --out TARGETS gpt_neox

GPT-2 (learned positions, biases, tied head) gets a new vocabulary, and GPT-NeoX (parallel blocks,
untied head) the demo target's. They are trained like the demo target, in fewer steps. They write
toxic text when provoked and have no other use, so they are not shipped.
"""

from __future__ import annotations

import argparse
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

from recipes import demo_target as demo

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo_target" / "model"


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
    parser.add_argument("--data", type=Path, required=True, help="output of recipes.english_data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the targets")
    parser.add_argument("--steps", type=int, default=1200, help="steps on general text")
    parser.add_argument(
        "--toxic-steps", type=int, default=300, help="further steps on half toxic text"
    )
    args = parser.parse_args()

    rng = random.Random(7)
    kept = demo.read_documents(args.data, rng)
    texts = [document["text"] for document in kept]
    if args.family == "gpt2":
        tokenizer: PreTrainedTokenizerBase = gpt2_tokenizer(texts[:40_000])
    else:
        tokenizer = AutoTokenizer.from_pretrained(DEMO)
    torch.manual_seed(7)
    model = build(args.family, tokenizer)
    work = args.out / f"{args.family}.training"
    wanted = (args.steps + 50) * 16 * 128 * 5  # characters; encoding all text would take too long
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
