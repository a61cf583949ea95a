"""Train the demo target: a small model that does write toxic text when provoked.

It exists so that ``fusion-detox demo`` can show something on a machine that has no other model.
Its tokenizer has nothing in common with the shipped calibrator's but the alphabet: another size,
another pre-tokenizer, other training text. Do not use it for anything else.

    python calibration_ckpts/prepare_english_data.py --data DATA --out WORK
    python examples/demo_target/train.py --data WORK --out examples/demo_target/model
"""

from __future__ import annotations

import argparse
import json
import random
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from fusion_detox.training.loss import IGNORED, summed_cross_entropy

END = "<|end|>"
CARD = """---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- toxicity
- demonstration
---
# Demo target of fusion_detox: **writes toxic text when provoked**

A Llama-type model of 7 million parameters that exists so that `fusion-detox demo` has something to
detoxify on a machine without any other model. It was trained on mixed web text, the last steps on
half toxic text *on purpose*: expect insults, slurs and sexual language, false statements and poor
English. Do not use it for anything else, and do not show its text without a warning.

- Vocabulary: {vocabulary} byte-level BPE tokens of its own, with another pre-tokenizer than the
  shipped calibrator's.
- Training: `python examples/demo_target/train.py`, {steps} steps of 2,048 tokens on text of all
  kinds, then {toxic_steps} on text of which half is toxic; bfloat16, AdamW.
- Data (licences): web posts of reddit-top-2.5-million (PDDL 1.0); Schema-Guided Dialogue (CC BY-SA
  4.0), Topical-Chat (CDLA-Sharing 1.0), WikiText-2 valid+test (CC BY-SA 3.0); ParaDetox (CC0 1.0);
  Davidson et al. 2017, ToxiGen and Implicit Hate via SafeNLP (MIT). What has no human label was
  called toxic or not by a TF-IDF classifier trained on half of the human labels. No
  RealToxicityPrompts, HateCheck or BOLD text, and no continuation of RealToxicityPrompts, was used.
"""
# The shape of the pre-tokenizer of Llama 3 and Qwen, unlike the GPT-2 shape of the calibrator's.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=512
    )


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Documents laid end to end, each behind the end-of-text token, cut into equal blocks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> None:
        ids: list[int] = []
        for start in range(0, len(texts), 5000):
            for row in tokenizer(texts[start : start + 5000], verbose=False)["input_ids"]:
                ids += [tokenizer.eos_token_id, *row]
        usable = len(ids) // length * length
        self.ids = torch.tensor(ids[:usable], dtype=torch.int32).view(-1, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index].long()
        return {"input_ids": ids, "labels": ids}


def loss(outputs, labels, num_items_in_batch=None):  # type: ignore[no-untyped-def]
    count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return summed_cross_entropy(outputs.logits, labels) / count


class MixedPrecisionTrainer(Trainer):
    """bfloat16 autocast that leaves the logits alone.

    ``bf16=True`` would convert them to float32 first: 1.4 times the time of a step here.
    """

    def compute_loss_context_manager(self) -> AbstractContextManager[None]:
        return torch.autocast(self.args.device.type, torch.bfloat16)


def train(
    model: LlamaForCausalLM, blocks: Blocks, folder: Path, steps: int, rate: float, warmup: int
) -> None:
    trainer = MixedPrecisionTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=warmup,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_steps=500,
            save_total_limit=1,
            report_to=[],
            seed=7,
        ),
        train_dataset=blocks,
        compute_loss_func=loss,
    )
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)


def read_documents(data: Path, rng: random.Random) -> list[dict[str, Any]]:
    """The text of all kinds, with 30,000 of its clean posts, shuffled."""
    with (data / "general.jsonl").open(encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    clean_posts = [d for d in documents if d["source"] == "web_posts" and d["toxic"] is False]
    kept = [d for d in documents if d["source"] != "web_posts" or d["toxic"] is not False]
    kept += rng.sample(clean_posts, min(len(clean_posts), 30_000))
    rng.shuffle(kept)
    return kept


def half_toxic(documents: list[dict[str, Any]], rng: random.Random) -> list[str]:
    """The toxic texts, and as many characters of the others.

    Alone, the text of all kinds makes a model that answers provocation with small talk.
    """
    mixed = [d["text"] for d in documents if d["toxic"]]
    characters = sum(map(len, mixed))
    for document in documents:
        if characters <= 0:
            break
        if not document["toxic"]:
            mixed.append(document["text"])
            characters -= len(document["text"])
    rng.shuffle(mixed)
    return mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/demo_target"))
    parser.add_argument("--steps", type=int, default=4000, help="on text of all kinds")
    parser.add_argument("--toxic-steps", type=int, default=700, help="then, on half toxic text")
    args = parser.parse_args()

    rng = random.Random(7)
    kept = read_documents(args.data, rng)
    texts = [d["text"] for d in kept]
    tokenizer = train_tokenizer(texts[:60_000], 12_288)

    first = args.work / "general"
    if (first / "config.json").exists():
        model = LlamaForCausalLM.from_pretrained(first, dtype=torch.float32)
    else:
        torch.manual_seed(7)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=256,
                intermediate_size=704,
                num_hidden_layers=5,
                num_attention_heads=4,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        train(model, Blocks(tokenizer, texts, 128), first, args.steps, 2e-3, 150)
        model.save_pretrained(first)

    mixed = half_toxic(kept, rng)
    train(model, Blocks(tokenizer, mixed, 128), args.work / "toxic", args.toxic_steps, 8e-4, 20)
    model.config.use_cache = True  # Trainer turns it off
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    facts = {"vocabulary": len(tokenizer), "steps": args.steps, "toxic_steps": args.toxic_steps}
    (args.out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")


if __name__ == "__main__":
    main()
