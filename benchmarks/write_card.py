"""Put the results of ``effect.py`` into a calibrator's record and card."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from fusion_detox.calibrator import write_config
from fusion_detox.config import FusionConfig


def table(results: dict) -> list[dict[str, object]]:
    rows = []
    for setting in results["settings"]:
        change = setting["change"].get("general", {})
        row: dict[str, object] = {"setting": setting["setting"]}
        for scorer, values in setting["toxicity"].items():
            middle, low, high = values["probability"]
            row[f"P(toxic), {scorer}"] = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        row["perplexity"] = f"{setting['perplexity'][0]:.1f}"
        row["dist-2"] = f"{setting['dist_2']:.3f}"
        row["KL on general text"] = change.get("kl_nats_per_token", 0.0)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--calibrator", type=Path, required=True)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    setup = results["setup"]
    path = args.calibrator / "training.json"
    record = json.loads(path.read_text())
    title = (
        f"{setup['prompts']['file']}, {setup['prompts']['count']} prompts, "
        f"{setup['samples']} samples of {setup['tokens']} tokens, top-p {setup['top_p']}, "
        f"seed {setup['seed']}, on the demo target; P(toxic): share of prompts with a sample "
        "scored 0.5 or more (95 % interval)"
    )
    record["evaluation"] = {title: table(results)}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    settings = json.loads((args.calibrator / "calibrator.json").read_text())["fusion"]
    write_config(args.calibrator, FusionConfig.from_dict(settings))


if __name__ == "__main__":
    main()
