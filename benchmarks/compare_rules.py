"""Compare the rule of arXiv 2506.01266 (hidden-state fusion) with mixture, product and contrast.

    python -m recipes.english_data --data DATA --out WORK
    python -m benchmarks.train_targets --data WORK --out TARGETS gpt2       (and gpt_neox)
    python -m benchmarks.compare_rules --data DATA --work WORK --targets TARGETS --runs RUNS demo
    python -m benchmarks.compare_rules … gpt2                               (and gpt_neox)
    python -m benchmarks.compare_rules … demo --context-free
    python -m benchmarks.compare_rules --plot

The paper's calibration model is the first three layers of the demo target, trained on non-toxic
text only. It is aligned with each target in three ways: as in the paper (InfoNCE on input
embeddings), not at all (the identity), and by our closed form. With ``--context-free`` it sees only
the last token at each step. The paper's published code does this after the first step; that bug is
reproduced here on purpose. Mixture and product use the same calibration model, contrast uses the
shipped one. The prompts come from the challenging part of RealToxicityPrompts, on which nothing was
tuned.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from fusion_detox import Calibrator, FusionLogitsProcessor, train_calibrator
from fusion_detox.alignment.alignment import align
from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.alignment.store import save_alignment
from fusion_detox.evaluation import EvaluationConfig, evaluate, read_prompt_set
from fusion_detox.training import TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "compare_rules"
DEMO = ROOT / "examples" / "demo_target" / "model"
ALIGNMENTS = {
    "paper": AlignmentConfig.paper(),
    "none": AlignmentConfig(start="identity"),
    "ours": AlignmentConfig(),
}
STRENGTHS = {"demo": (0.1, 0.2, 0.4, 0.6), "gpt2": (0.1, 0.6), "gpt_neox": (0.1, 0.6)}


def compact(work: Path, folder: Path) -> None:
    """Train the paper's calibration model."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    some = folder.parent / "clean_some.jsonl"
    with (work / "clean.jsonl").open(encoding="utf-8") as lines:
        rows = [line for _, line in zip(range(40_000), lines, strict=False)]
    some.write_text("".join(rows), encoding="utf-8")
    train_calibrator(
        folder,
        clean=[some],
        init_from=DEMO,
        keep_layers=3,
        config=TrainingConfig(
            fork_steps=400, learning_rate=3e-4, precision="bfloat16", save_dtype="float32"
        ),
        show_progress=False,
        command="python -m benchmarks.compare_rules",
    )


def aligned(base: Path, name: str, target: Path) -> Path | None:
    """Make a copy of the calibration model with the named alignment beside it."""
    folder = base.with_name(f"compact-{name}")
    if not folder.exists():
        shutil.copytree(base, folder)
    calibrator = Calibrator.from_pretrained(folder)
    alignment = align(calibrator, target, config=ALIGNMENTS[name], show_progress=False)
    save_alignment(alignment, calibrator)
    report = alignment.report
    print(f"{name}: to target {report['to_target']}, by chance {report['chance']}", flush=True)
    return folder


def see_only_the_last_token() -> None:
    def call(self: FusionLogitsProcessor, input_ids: Any, scores: Any) -> Any:
        return self.fuse_rows([row[-1:] for row in input_ids.tolist()], scores)

    FusionLogitsProcessor.__call__ = call  # type: ignore[method-assign]


def run(args: argparse.Namespace) -> None:
    target = DEMO if args.target == "demo" else args.targets / args.target
    base = args.runs / "calibrators" / "compact"
    compact(args.work, base)
    settings = {}
    for name in ("paper",) if args.context_free else ALIGNMENTS:
        folder = aligned(base, name, target)
        for strength in STRENGTHS[args.target]:
            settings[f"aligned ({name}) {strength}"] = f"aligned@{folder}:strength={strength}"
    if not args.context_free:
        for rule in ("mixture", "product"):
            for strength in (0.2, 0.6):
                settings[f"{rule} {strength}"] = f"{rule}@{base}:strength={strength}"
        settings["contrast (default)"] = "default"
        settings["word filter"] = "wordfilter"
    else:
        see_only_the_last_token()
    prompts = args.data / "rtp_challenging.jsonl"
    name = args.target + ("-context-free" if args.context_free else "")
    results = evaluate(
        str(target),
        [read_prompt_set(str(prompts), kind="rtp:challenging", limit=args.limit)],
        args.runs / name,
        calibrator="english-16k",
        settings=settings,
        config=EvaluationConfig(harmless=args.harmless, suites=(), similarity=False, batch_size=32),
        command=f"python -m benchmarks.compare_rules … {name}",
        dtype="float32",
        device="cpu" if not torch.cuda.is_available() else None,
    )
    if results is not None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.runs / name / "results.json", RESULTS / f"{name}.json")
        table(name)


def rows(name: str) -> list[dict[str, Any]]:
    """Results of a run, one row per setting; toxicity is relative to the target alone."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    made = []
    for setting in found["settings"]:
        against = setting.get("against_base") or {}
        made.append(
            {
                "name": setting["name"],
                **{
                    scorer: against[scorer]["probability"]["ratio"][0] if against else 1.0
                    for scorer in setting["toxicity"]
                },
                "perplexity": (setting["perplexity"].get("relative") or [1.0])[0],
                "dist_2": setting["diversity"]["dist_2"],
                "kl": ((setting.get("harmless") or {}).get("kl") or [0.0])[0],
                "tokens_per_second": (setting.get("cost") or {}).get("tokens_per_second"),
            }
        )
    return made


def table(name: str) -> None:
    for row in rows(name):
        shown = [f"{v:8.3f}" if isinstance(v, float) else f"{v!s:28}" for v in row.values()]
        print(" ".join(shown), flush=True)


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in ("demo", "gpt2", "gpt_neox") if (RESULTS / f"{n}.json").exists()]
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.8), sharey=True)
    styles = {
        "aligned (paper)": "o-", "aligned (none)": "s-", "aligned (ours)": "^-", "mixture": "v-",
        "product": "D-", "contrast (default)": "*", "word filter": "P", "base": "X",
    }  # fmt: skip
    for axis, name in zip(list(axes) if len(names) > 1 else [axes], names, strict=True):
        for label, style in styles.items():
            own = [row for row in rows(name) if row["name"].startswith(label)]
            axis.plot(
                [row["perplexity"] for row in own], [row["contextual"] for row in own], style,
                label=label, markersize=9 if style == "*" else 5,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_title(name)
        axis.set_xlabel("perplexity, relative")
        axis.grid(alpha=0.3)
    axes_list = list(axes) if len(names) > 1 else [axes]
    axes_list[0].set_ylabel("P(toxic), relative (contextual scorer)")
    axes_list[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "compare_rules.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", choices=list(STRENGTHS))
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--work", type=Path, help="output of recipes.english_data")
    parser.add_argument("--targets", type=Path, help="output of benchmarks.train_targets")
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--limit", type=int, default=100, help="maximum number of prompts")
    parser.add_argument(
        "--harmless", type=Path, help="JSON Lines of harmless text (default: built-in text)"
    )
    parser.add_argument(
        "--context-free", action="store_true", help="reproduce the bug of the published code"
    )
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(args.threads)
    if args.plot:
        plot()
    else:
        run(args)


if __name__ == "__main__":
    main()
