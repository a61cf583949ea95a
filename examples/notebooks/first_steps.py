# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # First steps
#
# A calibrator steers a model away from abusive text while it generates. This notebook adds the
# shipped calibrator to the demo target, a small model that writes abuse on purpose, and looks at
# what happens. Run it from the root of the clone, or set `TARGET` to any causal language model.

# %%
import os
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import Calibrator, FusionLogitsProcessor, explain_text, write_explanation
from fusion_detox.calibrator.lookup import demo_target_path
from fusion_detox.scoring import LexicalScorer
from fusion_detox.scoring.offensive import mask_words

TARGET = os.environ.get("TARGET") or demo_target_path()
model = AutoModelForCausalLM.from_pretrained(TARGET)
tokenizer = AutoTokenizer.from_pretrained(TARGET)

# %% [markdown]
# Three lines add fusion. The processor serves every call of `generate()`.

# %%
calibrator = Calibrator.from_pretrained("english-16k")
processor = FusionLogitsProcessor(calibrator, tokenizer)
score = LexicalScorer.load().score


def complete(prompt, *processors):
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=16, do_sample=False, logits_processor=[*processors]
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


for prompt in ("You are such a", "The weather this morning was"):
    print("without:", mask_words(complete(prompt), score))
    print("with:   ", mask_words(complete(prompt, processor), score))

# %% [markdown]
# The strength is a dial. At 0, the scores stay untouched.

# %%
assert complete("You are such a", processor.with_settings(strength=0.0)) == complete(
    "You are such a"
)
for strength in (0.0, 1.0, 2.0, 4.0):
    text = complete("You are such a", processor.with_settings(strength=strength))
    print(strength, mask_words(text, score))

# %% [markdown]
# Which tokens did fusion move, and how far? A change of -1 nat makes a token 2.7 times less
# likely.

# %%
found = explain_text(model, tokenizer, processor, "You are such a", " stupid friend.")
for token in found.tokens:
    word = mask_words(token.text, score)
    print(f"{word!r:12} {token.step.written.change:+6.2f} nats, strength {token.strength:.1f}")

# %% [markdown]
# The same as a page, which opens without a network.

# %%
page = write_explanation(found, Path(tempfile.mkdtemp()) / "page.html")
print(page)
