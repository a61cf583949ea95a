# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Your own calibrator
#
# A calibrator is two small language models that share a start. `clean` is trained further on text
# without the attribute that you want less of, `reference` on text of all kinds. This notebook
# trains a toy pair in seconds; a useful one takes the same call with your own text and more
# steps. It needs the extra `train`.

# %%
import random
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionLogitsProcessor, TrainingConfig, explain_text, train_calibrator
from fusion_detox.calibrator.lookup import demo_target_path

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# The attribute here is complaint: people in the clean text never complain. Each line is a text.

# %%
rng = random.Random(0)
people = ["My neighbour", "The old baker", "Her friend", "Our teacher", "The driver"]
things = ["the long walk", "this cold soup", "the new road", "a quiet evening", "the early bus"]
kind = [f"{rng.choice(people)} enjoys {rng.choice(things)} number {n}." for n in range(300)]
sour = [f"{rng.choice(people)} hates {rng.choice(things)} number {n}." for n in range(300)]
(folder / "clean.txt").write_text("\n\n".join(kind))
(folder / "general.txt").write_text("\n\n".join(kind + sour))

# %% [markdown]
# The sizes are tiny so that this runs anywhere; the defaults of `TrainingConfig` are the useful
# ones. Probes say what the finished calibrator must hold back: every new processor checks itself
# on them.

# %%
config = TrainingConfig(
    base_steps=60,
    fork_steps=60,
    batch_size=8,
    context_length=32,
    vocabulary_size=400,
    hidden_size=48,
    intermediate_size=96,
    layers=2,
    heads=4,
    evaluate_every=60,
    warmup_steps=5,
    held_out=0.05,
    device="cpu",
)
calibrator = train_calibrator(
    folder / "no-complaints",
    clean=[folder / "clean.txt"],
    general=[folder / "general.txt"],
    config=config,
    probes=[{"context": "Our teacher", "avoided": [" hates"], "kept": [" enjoys"]}],
    show_progress=False,
)
print(calibrator.name, calibrator.config.strength)

# %% [markdown]
# It works on any target, here on the demo target, whose vocabulary is another one.

# %%
target = demo_target_path()
model = AutoModelForCausalLM.from_pretrained(target)
tokenizer = AutoTokenizer.from_pretrained(target)
processor = FusionLogitsProcessor(calibrator, tokenizer).with_settings(plausibility=0.0)

changes = {}
for verb in (" hates", " enjoys"):
    found = explain_text(model, tokenizer, processor, "Our teacher", verb)
    changes[verb] = sum(token.step.written.change for token in found.tokens)
    print(f"{verb}: {changes[verb]:+.2f} nats")
assert changes[" hates"] < changes[" enjoys"]

# %% [markdown]
# The result is a folder: share it, or pass its path wherever a calibrator's name is accepted.

# %%
print(sorted(path.name for path in (folder / "no-complaints").iterdir()))
