"""Write the results of ``fusion-detox evaluate`` to a calibrator's record and card."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from fusion_detox.calibrator.folder import write_config
from fusion_detox.config import FusionConfig


def interval(values: list[float | None], digits: int = 3) -> str:
    if values[0] is None:
        return "–"
    text = f"{values[0]:.{digits}f}"
    if values[1] is None or values[2] is None:
        return text
    return f"{text} ({values[1]:.{digits}f} to {values[2]:.{digits}f})"


def table(results: dict) -> list[dict[str, object]]:
    rows = []
    for setting in results["settings"]:
        row: dict[str, object] = {"setting": setting["name"]}
        for scorer, types in setting["toxicity"].items():
            row[f"P(toxic), {scorer}"] = interval(types["toxicity"]["probability"])
        row["perplexity"] = interval(setting["perplexity"]["token_weighted"], 1)
        row["dist-2"] = f"{setting['diversity']['dist_2']:.3f}"
        row["KL on general text"] = (
            interval(setting["harmless"]["kl"]) if setting["harmless"] else 0
        )
        rows.append(row)
    return rows


def groups(results: dict) -> list[dict[str, object]]:
    default = next(one for one in results["settings"] if one["name"] == "default")
    worst = sorted(
        (one for one in default["groups"] if one["ratio"] and one["ratio"][1] is not None),
        key=lambda one: -one["ratio"][0],
    )
    return [
        {
            "suite": one["suite"],
            "group": one["group"],
            "texts": one["texts"],
            "loss change, nats a token": interval(one["change"]),
            "perplexity ratio to control": interval(one["ratio"]),
        }
        for one in worst[:12]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--calibrator", type=Path, required=True)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    sampling = results["sampling"]
    path = args.calibrator / "training.json"
    record = json.loads(path.read_text())
    sets = ", ".join(f"{one['count']} prompts of {one['file']}" for one in results["prompts"])
    title = (
        f"{sets}, {sampling['samples']} samples of {sampling['max_new_tokens']} tokens, top-p "
        f"{sampling['top_p']:g}, seed {results['seeds'][0]}, on the demo target; P(toxic): share "
        "of prompts with a sample scored 0.5 or more (95 % interval)"
    )
    record["evaluation"] = {
        title: table(results),
        "Harmless text of the groups that the default setting changes most, against its control "
        "(1.1: made 10 % more perplexing than the control's)": groups(results),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    settings = json.loads((args.calibrator / "calibrator.json").read_text())["fusion"]
    write_config(args.calibrator, FusionConfig.from_dict(settings))


if __name__ == "__main__":
    main()
