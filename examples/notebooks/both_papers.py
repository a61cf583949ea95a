# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Both papers in one notebook
#
# - [arXiv 2401.08491](https://arxiv.org/abs/2401.08491), *contrastive perplexity*: a model learns
#   from sets of sentences with the same meaning, some toxic and some not, which wordings to
#   avoid.
# - [arXiv 2506.01266](https://arxiv.org/abs/2506.01266), *detoxification by fusing hidden
#   states*: a learned matrix projects a small model's last hidden state into the target's space,
#   where both are mixed.
#
# Here, a tiny calibrator learns by the first paper's objective, and its hidden states are fused
# into the demo target by the second paper's rule. It needs the extra `train`.

# %%
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import (
    FusionConfig,
    FusionLogitsProcessor,
    TrainingConfig,
    align,
    train_calibrator,
)
from fusion_detox.calibrator.lookup import demo_target_path

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1. Contrastive perplexity
#
# Each row is an anchor with positives (harmless wordings) and negatives (harsh ones).

# %%
kind = ["the friend is kind today", "she is a gentle person", "they help their old neighbours"]
harsh = ["the friend is an idiot today", "she is a horrid person", "they hate their old neighbours"]
endings = [f"and number {n} is here" for n in range(30)]
rows = [
    {"anchor": f"{good} {end}", "positives": [f"{good} {end}"], "negatives": [f"{bad} {end}"]}
    for good, bad in zip(kind, harsh, strict=True)
    for end in endings
]
(folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
texts = [text for row in rows for text in (*row["positives"], *row["negatives"])]
(folder / "general.txt").write_text("\n\n".join(texts))

calibrator = train_calibrator(
    folder / "contrastive",
    general=[folder / "general.txt"],
    pairs=[folder / "pairs.jsonl"],
    config=TrainingConfig(
        objective="contrastive-perplexity",
        objective_steps=40,
        objective_learning_rate=3e-3,
        base_steps=40,
        fork_steps=5,
        batch_size=4,
        anchors=4,
        context_length=24,
        vocabulary_size=320,
        hidden_size=32,
        intermediate_size=64,
        layers=2,
        heads=2,
        evaluate_every=40,
        held_out=0.1,
        device="cpu",
    ),
    show_progress=False,
)

# %% [markdown]
# What did the clean model learn? Its log-probability per token of harsh and of kind sentences,
# against the reference, which has not seen the objective. The objective's distance has no sign:
# it moves the two kinds of text apart, and nothing in it says in which direction
# ([why](../../docs/hard-negatives.md)).


# %%
def log_prob(model, text):
    ids = torch.tensor([[calibrator.bos_id, *calibrator.tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        return -model(input_ids=ids, labels=ids).loss.item()


moved = {}
for name, sentences in (("kind", kind), ("harsh", harsh)):
    shifts = [
        log_prob(calibrator.clean, one) - log_prob(calibrator.reference, one) for one in sentences
    ]
    moved[name] = sum(shifts) / len(shifts)
    print(f"{name}: {moved[name]:+.3f} nats per token")
assert moved["kind"] != moved["harsh"]

# %% [markdown]
# ## 2. Fusion of hidden states
#
# `align` learns the projection from the embeddings of tokens that both vocabularies have. The
# rule `aligned` then mixes `(1 - a)` of the target's last hidden state with `a` of the projected
# one.

# %%
target = AutoModelForCausalLM.from_pretrained(demo_target_path())
tokenizer = AutoTokenizer.from_pretrained(demo_target_path())
alignment = align(calibrator, target, tokenizer)
print(alignment.report["to_target"], "by chance", alignment.report["chance"])

inputs = tokenizer("The weather this morning was", return_tensors="pt")
outputs = {}
for strength in (0.0, 0.1, 0.3):
    processor = FusionLogitsProcessor(
        calibrator,
        tokenizer,
        FusionConfig(rule="aligned", strength=strength, plausibility=0.0),
        target=target,
        alignment=alignment,
    )
    output = target.generate(
        **inputs, max_new_tokens=10, do_sample=False, logits_processor=[processor]
    )
    outputs[strength] = tokenizer.decode(output[0], skip_special_tokens=True)
    print(strength, outputs[strength])

alone = target.generate(**inputs, max_new_tokens=10, do_sample=False)
assert outputs[0.0] == tokenizer.decode(alone[0], skip_special_tokens=True)

# %% [markdown]
# A calibrator this small knows nothing about language: its alignment is no better than chance, and
# its fused text gets worse, not better. The shipped calibrator and the rule `contrast` are what you
# would use: see [first steps](first_steps.py), and [the aligned rules](../../docs/aligned.md) for
# measurements of both.
