"""Train the demo target, a small model that writes toxic text when provoked.

    python -m recipes.english_data --data DATA --out WORK
    python -m recipes.demo_target --data WORK --out examples/demo_target/model

``fusion-detox demo`` uses it on machines without any other model. Do not use it for anything else.
Its tokenizer shares only the byte alphabet with the shipped calibrator's: size, pre-tokenizer and
training text all differ.
"""

from __future__ import annotations

import argparse
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
from recipes.english_data import read

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

A Llama-type model of 7 million parameters that gives `fusion-detox demo` something to detoxify on
a machine without any other model. It was trained on mixed web text, and in its last steps on half
toxic text *on purpose*. Expect insults, slurs, sexual language, false statements and poor English.
Do not use it for anything else, and do not show its text without a warning.

- Vocabulary: {vocabulary} byte-level BPE tokens; the pre-tokenizer differs from the shipped
  calibrator's.
- Training: `python -m recipes.demo_target`, {steps} steps of 2,048 tokens on general text, then
  {toxic_steps} steps on text of which half is toxic; bfloat16, AdamW.
- Data (licences): web posts of reddit-top-2.5-million (PDDL 1.0); Schema-Guided Dialogue (CC BY-SA
  4.0), Topical-Chat (CDLA-Sharing 1.0), WikiText-2 valid+test (CC BY-SA 3.0); ParaDetox (CC0 1.0);
  Davidson et al. 2017, ToxiGen and Implicit Hate via SafeNLP (MIT). Text without a human
  label was labelled by a TF-IDF classifier trained on half of the human labels. RealToxicityPrompts
  (including its continuations), HateCheck and BOLD were not used.
"""
# The pre-tokenizer pattern of Llama 3 and Qwen; the calibrator uses GPT-2's.
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
    """Concatenated documents, each after an end-of-text token, cut into blocks of equal length."""

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
    """``Trainer`` with autocast that keeps the logits in bfloat16.

    ``bf16=True`` would convert them to float32, which makes a step 1.4 times as long here.
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
    """General text with 30,000 of its clean posts, shuffled."""
    documents = read(data / "general.jsonl")
    clean_posts = [d for d in documents if d["source"] == "web_posts" and d["toxic"] is False]
    kept = [d for d in documents if d["source"] != "web_posts" or d["toxic"] is not False]
    kept += rng.sample(clean_posts, min(len(clean_posts), 30_000))
    rng.shuffle(kept)
    return kept


def half_toxic(documents: list[dict[str, Any]], rng: random.Random) -> list[str]:
    """The toxic texts, and the same number of characters of other text.

    A model trained on general text alone answers provocation with small talk.
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
    parser.add_argument("--data", type=Path, required=True, help="output of recipes.english_data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/demo_target"))
    parser.add_argument("--steps", type=int, default=4000, help="steps on general text")
    parser.add_argument(
        "--toxic-steps", type=int, default=700, help="further steps on half toxic text"
    )
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
