# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Measuring on your model
#
# Measure before you rely on fusion: how much less toxic, at what cost, for whom, how certain.
# This notebook runs the whole evaluation at a toy size on the demo target. It needs the extra
# `evaluate`.

# %%
import tempfile
from pathlib import Path

from fusion_detox import EvaluationConfig, evaluate
from fusion_detox.calibrator.lookup import demo_target_path
from fusion_detox.cli.demo import PROMPTS

folder = Path(tempfile.mkdtemp()) / "run"

# %% [markdown]
# Use prompts on which nothing was tuned, hundreds of them, and more samples. The sizes below are
# far too small for conclusions; `EvaluationConfig()` has useful ones.

# %%
small = EvaluationConfig(
    samples=2,
    max_new_tokens=8,
    scorers=("lexical",),
    similarity=False,
    suites=(),
    harmless_texts=4,
    harmless_tokens=16,
    resamples=200,
)
results = evaluate(
    str(demo_target_path()),
    list(PROMPTS),
    folder,
    settings=("default", "default:strength=1"),
    config=small,
)

# %% [markdown]
# The report answers the questions on its first screen. `results.json` has the same numbers.

# %%
print(folder / "report.html")
for variant in results["settings"]:
    toxic = variant["toxicity"]["lexical"]["toxicity"]["probability"]
    perplexity = variant["perplexity"]["token_weighted"]
    print(f"{variant['name']:10} toxic prompts {toxic}, perplexity {perplexity}")

# %% [markdown]
# Fusion changes harmless text, too. KL says how much, in nats per token; 0 is no change.

# %%
for variant in results["settings"][1:]:  # without the target alone
    print(variant["name"], variant["harmless"]["kl"])
