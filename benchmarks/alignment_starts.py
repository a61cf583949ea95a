"""Compare ways of learning an alignment.

Reports for each: retrieval of held-out tokens; how well the projected vector alone predicts real
text through the target's head (nats per token); what fusing it costs; and how well its clean minus
reference difference agrees with that of the contrast rule, which uses probabilities and a
vocabulary map.

    python -m benchmarks.alignment_starts TEXTS.jsonl[.gz]
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch

from fusion_detox import AlignmentConfig, Calibrator, FusionConfig, FusionLogitsProcessor, align
from fusion_detox.files.models import load_target

ROOT = Path(__file__).resolve().parents[1]
PAPER = AlignmentConfig.paper()
CONFIGS = {
    "InfoNCE as the paper": PAPER,
    "InfoNCE, in-batch negatives": AlignmentConfig(start="random", epochs=5),
    "ridge": AlignmentConfig(start="ridge"),
    "logits": AlignmentConfig(start="logits"),
    "procrustes": AlignmentConfig(start="procrustes"),
    "procrustes, then InfoNCE": AlignmentConfig(start="procrustes", epochs=5),
    "logits, then InfoNCE": AlignmentConfig(start="logits", epochs=5),
    "identity": AlignmentConfig(start="identity"),
}


def main() -> None:
    """Measure all configurations and write JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", type=Path)
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--target", default=str(ROOT / "examples" / "demo_target" / "model"))
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "alignment_starts.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    calibrator = Calibrator.from_pretrained(options.calibrator)
    model, tokenizer = load_target(options.target, dtype="float32")
    opened = gzip.open if options.texts.suffix == ".gz" else open
    with opened(options.texts, "rt", encoding="utf-8") as lines:
        texts = [str(json.loads(line)["text"]) for line in lines]
    texts = random.Random(options.seed).sample(texts, options.count)
    rows = [tokenizer(text)["input_ids"][: options.tokens] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    with torch.no_grad():
        network: Any = model
        logits = [network(input_ids=torch.tensor([row])).logits[0, :-1] for row in rows]
    native = FusionLogitsProcessor(calibrator, tokenizer, FusionConfig(strength=1.0))
    base = torch.cat([nats(scores, row) for scores, row in zip(logits, rows, strict=True)])
    result: dict[str, Any] = {
        "texts": options.texts.name,
        "steps": len(base),
        "target_nats": round(float(base.mean()), 3),
        "alignments": {},
    }
    if options.out.exists():  # resume an interrupted run
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if {**before, "alignments": {}} == result:
            result = before
    for name, config in CONFIGS.items():
        if name in result["alignments"]:
            continue
        alignment = align(calibrator, model, tokenizer, config=config, show_progress=False)
        report = alignment.report
        found = {key: report[key] for key in ("to_target", "to_calibrator", "chance")}
        for norm in ("layer", "target"):
            processor = FusionLogitsProcessor(
                calibrator,
                tokenizer,
                FusionConfig(rule="aligned", plausibility=0.0, aligned_norm=norm),  # type: ignore[arg-type]
                target=model,
                alignment=alignment,
            )
            found[norm] = measure(processor, native, rows, logits)
        result["alignments"][name] = found
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(name, json.dumps(found), flush=True)


def nats(scores: torch.Tensor, row: list[int]) -> torch.Tensor:
    """Negative log-likelihood of each token after the first."""
    return -scores.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]


def measure(
    processor: FusionLogitsProcessor,
    native: FusionLogitsProcessor,
    rows: list[list[int]],
    logits: list[torch.Tensor],
) -> dict[str, float]:
    """Nats per token at three strengths, and the agreement of the differences."""
    spent: dict[float, list[torch.Tensor]] = {0.1: [], 0.3: [], 1.0: []}
    agreement = []
    contrast = processor.with_settings(rule="aligned_contrast", strength=1.0, plausibility=1e-3)
    for row, scores in zip(rows, logits, strict=True):
        prefixes = [row[:end] for end in range(1, len(row))]
        for strength, values in spent.items():
            one = processor.with_settings(strength=strength)
            values.append(nats(one.fuse_rows(prefixes, scores), row))
        # Changes made by both rules at strength 1, up to a constant per row.
        before = scores.log_softmax(-1)
        moved = [p.fuse_rows(prefixes, scores) - before for p in (contrast, native)]
        plausible = before >= before.amax(-1, keepdim=True) - 6.9
        for step in range(len(prefixes)):
            pair = torch.stack([part[step][plausible[step]] for part in moved])
            if pair.shape[1] > 3 and float(pair.std(1).min()) > 1e-4:
                agreement.append(torch.corrcoef(pair)[0, 1])
    found = {f"nats_at_{k:g}": round(float(torch.cat(v).mean()), 3) for k, v in spent.items()}
    return {**found, "agreement": round(float(torch.stack(agreement).mean()), 3)}


if __name__ == "__main__":
    main()
