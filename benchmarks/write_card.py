"""Write the results on real targets to a calibrator's record and card, and print their tables.

    python -m benchmarks.write_card [--calibrator calibration_ckpts/english-16k]

Reads ``results/peers/TARGET.json`` of ``benchmarks.peers`` and, where it exists, the run
``harmless`` of ``benchmarks.effect`` in ``results/TARGET_harmless``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fusion_detox.calibrator.folder import write_config
from fusion_detox.config import FusionConfig
from fusion_detox.files.atomic import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
NAMES = {
    "smollm2": "SmolLM2 135M Instruct",
    "gemma3": "Gemma 3 270M",
    "qwen": "Qwen2.5 Coder 0.5B Instruct",
}
METHODS = {"unfused": "model alone", "contrast": "with fusion", "word-filter": "word filter"}


def interval(values: list[float | None], digits: int = 2, sign: str = "") -> str:
    """A value with its interval; the bounds are left out if they equal the value."""
    value, low, high = values
    if value is None:
        return "–"
    text = f"{value:.{digits}f}{sign}"
    if low is None or high is None or low == high:
        return text
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def toxicity(results: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each method: absolute for the model alone, ratios to it for the others."""
    rows = []
    for one in results["results"]:
        alone = one["method"] == "unfused"
        row = {"": METHODS.get(one["method"], one["method"])}
        for scorer, values in one["toxicity"].items():
            shown = values["probability"] if alone else values["ratio"]["ratio"]
            row[f"P(toxic), {scorer}"] = interval(shown, sign="" if alone else "×")
        fluency = one["perplexity"]
        shown = fluency["token_weighted"] if alone else fluency["relative"]
        row["perplexity"] = interval(shown, 1 if alone else 2, "" if alone else "×")
        row["dist-2"] = f"{one['diversity']['dist_2']:.3f}"
        row["broken"] = f"{one['diversity']['degenerate']:.3f}"
        rows.append(row)
    return rows


def side_effects(results: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each setting: harmless text, an assistant's answers, groups, dialect."""
    rows = []
    for one in results["settings"]:
        if one["name"] == "base":
            continue
        row = {"": {"default": "with fusion", "wordfilter": "word filter"}.get(one["name"], "")}
        row["KL on harmless text"] = interval(one["harmless"]["kl"], 4)
        answers = (one["assistant"] or {}).get("harmless")
        if answers:
            row["answers unchanged"] = interval(answers["unchanged"])
            row["KL on answers"] = interval(answers["kl"], 4)
        ratios = [
            (group["ratio"][0], group["group"], group["suite"])
            for group in one["groups"]
            if group["ratio"] and group["ratio"][0] is not None
        ]
        named = [ratio for ratio in ratios if ratio[2] == "identity"]
        dialect = [ratio for ratio in ratios if ratio[2] == "dialect"]
        if named:
            row["largest group"] = f"{max(named)[0]:.2f}× ({max(named)[1]})"
        if dialect:
            row["dialect"] = f"{max(dialect)[0]:.2f}× ({max(dialect)[1]})"
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--calibrator", type=Path, default=ROOT / "calibration_ckpts" / "english-16k"
    )
    args = parser.parse_args()
    tables: dict[str, list[dict[str, str]]] = {}
    for target, name in NAMES.items():
        path = RESULTS / "peers" / f"{target}.json"
        if path.exists():
            results = json.loads(path.read_text())
            seeds = ", ".join(map(str, results["seeds"]))
            tables[
                f"{name}: {results['prompts']} challenging prompts of RealToxicityPrompts on which "
                f"nothing was tuned, {results['samples']} samples of 20 tokens, top-p 0.9, seeds "
                f"{seeds}; P(toxic): share of prompts with a sample scored 0.5 or more (95 % "
                "interval); × is relative to the model alone"
            ] = toxicity(results)
        path = RESULTS / f"{target}_harmless" / "results.json"
        if path.exists():
            tables[
                f"{name}, harmless text: KL in nats per token; answers to 100 harmless questions "
                "that stay word for word under greedy decoding; perplexity of text about the group "
                "and in the dialect that change most, relative to their controls"
            ] = side_effects(json.loads(path.read_text()))
    path = args.calibrator / "training.json"
    record = {**json.loads(path.read_text()), "evaluation": tables}
    write_whole(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    settings = json.loads((args.calibrator / "calibrator.json").read_text())["fusion"]
    write_config(args.calibrator, FusionConfig.from_dict(settings))
    for title, rows in tables.items():
        print(f"{title}\n\n{markdown(rows)}\n")


if __name__ == "__main__":
    main()
