"""Small-scale ablations of arXiv 2401.08491: the effect of positives, negatives and hardness.

    python -m recipes.english_data --data DATA --out WORK
    python -m recipes.english_pairs --data DATA --work WORK
    python -m benchmarks.make_dev_prompts --data DATA --work WORK
    python -m benchmarks.contrastive_ablation --work WORK --runs RUNS

Each case fine-tunes the demo target with LoRA for the same number of steps, on toxic and non-toxic
continuations of the same beginnings, and then continues development prompts. Easy negatives are
those of other beginnings. "Negatives only" uses the signed margin with a fixed prototype, a margin
that is never reached and no other term, because J is undefined without positives. Perplexity is
measured by the unchanged target, and bits per byte on held-out encyclopedia text and dialogues.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from fusion_detox.evaluation import EvaluationConfig, evaluate, read_prompt_set
from fusion_detox.files.models import load_target
from fusion_detox.training import finetune
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.finetuning.config import FinetuneConfig
from recipes.english_data import read

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo_target" / "model"
RESULTS = Path(__file__).parent / "results" / "contrastive_ablation.json"
J = "contrastive-perplexity"
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "positives only": (J, {"negatives": 0, "lm_weight": 1.0}, True),
    "negatives only": (
        "signed-margin",
        {"centroid": "fixed", "margin": 20.0, "lm_weight": 0.0, "kl_weight": 0.0},
        True,
    ),
    "J, one of each": (J, {"positives": 1, "negatives": 1}, True),
    "J": (J, {}, True),
    "J, easy negatives": (J, {}, False),
    "J, exponent": (J, {"temperature_in": "exponent", "perplexity": "log"}, True),
    "signed margin": ("signed-margin", {}, True),
    "signed margin, easy negatives": ("signed-margin", {}, False),
    "likelihood ratio": ("likelihood-ratio", {}, True),
    "DPO": ("dpo", {}, True),
}


def shuffled(pairs: Path, out: Path) -> None:
    """Write the same sets with the negatives of other beginnings."""
    rows = read(pairs)
    order = random.Random(3).sample(range(len(rows)), len(rows))
    with out.open("w", encoding="utf-8") as file:
        for at, row in enumerate(rows):
            other = rows[order[at]]["negatives"]
            own = {" ".join(text.split()) for text in row["positives"]}
            kept = [text for text in other if " ".join(text.split()) not in own]
            if kept:
                row = {**row, "negatives": kept, "provenance": {}}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def merged(adapter: Path, folder: Path) -> None:
    from peft import PeftModel

    model, tokenizer = load_target(str(DEMO), dtype="float32")
    whole: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="output of recipes.english_data and english_pairs"
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(args.threads)

    args.runs.mkdir(parents=True, exist_ok=True)
    easy = args.runs / "easy.jsonl"
    shuffled(args.work / "pairs.jsonl", easy)
    general = args.runs / "general.jsonl"
    with (args.work / "clean.jsonl").open(encoding="utf-8") as lines:
        some = [line for _, line in zip(range(8000), lines, strict=False)]
    general.write_text("".join(some), encoding="utf-8")
    prompts = [read_prompt_set(str(args.work / "dev_prompts.jsonl"))]
    rows = []
    for name in ("base", *args.cases):
        folder = args.runs / name.replace(" ", "-").replace(",", "")
        drift: dict[str, Any] = {}
        target = DEMO
        if name != "base":
            objective, changes, hard = CASES[name]
            if not (folder / "adapter").exists():
                finetune(
                    DEMO,
                    folder / "adapter",
                    pairs=[args.work / "pairs.jsonl" if hard else easy],
                    general=[general],
                    config=FinetuneConfig(
                        objective=objective,  # type: ignore[arg-type]
                        steps=args.steps,
                        learning_rate=args.learning_rate,
                        evaluate_every=args.steps,
                    ),
                    contrast=ContrastiveConfig(**changes),
                    show_progress=False,
                )
            if not (folder / "merged").exists():
                merged(folder / "adapter", folder / "merged")
            target = folder / "merged"
            drift = json.loads((folder / "adapter" / "training.json").read_text())["held_out"]
        results = evaluate(
            str(target),
            prompts,
            folder / "evaluation",
            calibrator="english-16k",
            settings=[],
            config=EvaluationConfig(suites=(), perplexity_model=str(DEMO), batch_size=32),
            dtype="float32",
            device="cpu",
        )
        assert results is not None
        found = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))
        base = found["settings"][0]
        rows.append(
            {
                "name": name,
                **{
                    scorer: measured["toxicity"]["probability"]
                    for scorer, measured in base["toxicity"].items()
                },
                "perplexity": base["perplexity"]["token_weighted"],
                "dist_2": base["diversity"]["dist_2"],
                "similarity_to_prompt": base["similarity"]["to_prompt"],
                "held_out": drift,
            }
        )
        print(json.dumps(rows[-1])[:400], flush=True)
        shutil.rmtree(folder / "merged", ignore_errors=True)
    RESULTS.write_text(
        json.dumps(
            {
                "command": f"python -m benchmarks.contrastive_ablation --steps {args.steps}",
                "steps": args.steps,
                "learning_rate": args.learning_rate,
                "prompts": "144 development prompts, 5 samples of 20 tokens, top-p 0.9, seed 1",
                "rows": rows,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
