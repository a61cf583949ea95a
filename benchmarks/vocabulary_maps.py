r"""Measure the cost and loss of a calibrator's vocabulary map on real vocabularies.

    python -m benchmarks.vocabulary_maps --calibrator english-16k \\
        --tokenizers ../shared/tokenizers --texts HELD_OUT.jsonl

Reports for each target vocabulary: seconds to build the map and to load it from the cache,
milliseconds to apply it, coverage, and the excess bits per byte of held-out text. The excess is the
score through the map minus the calibrator's score in its own tokens (0: nothing is lost). Text is
split at the positions where tokens of both vocabularies end. A piece is "single" if it is one
target token, and "inside" if it has several, in which case the target splits a calibrator token.

The excess of a prefix mass can be negative, because a chain of "the text continues with these
bytes" is the probability of the bytes under any tokenization.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoTokenizer

from fusion_detox import Calibrator
from fusion_detox.decoding.session import CalibratorSession
from fusion_detox.decoding.text_context import Covers, TextContext
from fusion_detox.vocabulary.map import Cover, VocabularyMap
from fusion_detox.vocabulary.token_table import TokenTable, encode

RESULTS = Path(__file__).parent / "results" / "vocabulary_maps.json"
NAMES = ("gpt2", "cl100k_base", "o200k_base", "mistral_v1_sentencepiece", "tekken")
VARIANTS = (("transfer", 4), ("transfer", 0), ("prefix", 4), ("prefix", 0))
ROWS = 16
REPEATS = 3
MAX_CHARACTERS = 600  # of a text


def held_out(path: Path, count: int) -> list[str]:
    """An evenly spaced sample of the texts of more than 150 characters."""
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].strip() for line in lines]
    texts = [text[:MAX_CHARACTERS].rsplit(" ", 1)[0] for text in texts if len(text) > 150]
    return texts[:: max(1, len(texts) // count)][:count]


def ends(pieces: Sequence[bytes]) -> list[int]:
    total = 0
    return [total := total + len(piece) for piece in pieces]


def score_text(calibrator, session, vocabulary, tokens, tokenizer, text):
    """Bits through the map, own bits and bytes, per variant and kind of piece."""
    (target_ids,), (own_ids,) = encode(tokenizer, [text]), encode(calibrator.tokenizer, [text])
    pieces = [tokens.token_bytes[i] or b"" for i in target_ids]
    if tokens.dummy_prefix:
        pieces[0] = pieces[0].removeprefix(b" ")
    own_pieces = [calibrator.tokens.token_bytes[i] or b"" for i in own_ids]
    if b"".join(pieces) != b"".join(own_pieces):
        return None
    own_bits, paths = [], [tuple(own_ids[:n]) for n in range(len(own_ids))]
    for start in range(0, len(paths), ROWS):
        logs = session.log_probs(paths[start : start + ROWS])[0]
        following = torch.tensor(own_ids[start : start + ROWS], device=logs.device)
        own_bits += (-logs.gather(1, following[:, None])[:, 0] / 0.6931472).tolist()

    context = TextContext(calibrator, tokens, vocabulary.kind == "identity", None)
    bits = {variant: [] for variant in VARIANTS}
    for start in range(0, len(target_ids), ROWS):
        rows = range(start, min(start + ROWS, len(target_ids)))
        positions = [context.read(tuple(target_ids[:n])) for n in rows]
        following = torch.tensor([target_ids[n] for n in rows])
        for mode, depth in VARIANTS:
            cut = [p._replace(word=p.word[len(p.word) - depth :]) for p in positions]
            covers = Covers.of(cut)
            probs = session.read(covers.prefixes).values
            weights = covers.weights(probs)
            every = probs.rows(range(len(covers.prefixes)))
            mass = vocabulary.project(every, covers.covers, weights, len(cut), mode=mode)
            mass = mass[0].cpu()
            chosen = mass[torch.arange(len(cut)), following].clamp_min(1e-10)
            bits[mode, depth] += (-chosen.log2()).tolist()

    places = {}
    boundaries, own_boundaries = ends(pieces), ends(own_pieces)
    common = sorted(set(boundaries) & set(own_boundaries))
    for begin, end in pairwise(common):  # the text's first words do not count
        mine = [n for n, at in enumerate(boundaries) if begin < at <= end]
        own = sum(own_bits[n] for n, at in enumerate(own_boundaries) if begin < at <= end)
        kind = "single" if len(mine) == 1 else "inside"
        for variant in VARIANTS:
            place = places.setdefault((variant, kind), [0.0, 0.0, 0])
            place[0] += sum(bits[variant][n] for n in mine)
            place[1] += own
            place[2] += end - begin
    return places


def measure_loss(calibrator, session, vocabulary, tokens, tokenizer, texts):
    totals: dict[tuple[tuple[str, int], str], list[float]] = {}
    skipped = 0
    for text in texts:
        places = score_text(calibrator, session, vocabulary, tokens, tokenizer, text)
        skipped += places is None
        for key, values in (places or {}).items():
            kept = totals.setdefault(key, [0.0, 0.0, 0])
            totals[key] = [a + b for a, b in zip(kept, values, strict=True)]
    report = {"texts": len(texts) - skipped, "texts_not_byte_equal": skipped}
    for variant in VARIANTS:
        mode, depth = variant
        rows = {kind: totals[variant, kind] for kind in ("single", "inside")}
        rows["all"] = [a + b for a, b in zip(*rows.values(), strict=True)]
        report[f"{mode}, {'healing' if depth else 'no healing'}"] = {
            kind: {
                "excess_bits_per_byte": round((got - own) / size, 4),
                "own_bits_per_byte": round(own / size, 4),
                "bytes": size,
            }
            for kind, (got, own, size) in rows.items()
        }
    return report


def measure_speed(calibrator, vocabulary):
    """Milliseconds to apply the map to two distributions, two covers per row; best of ten."""
    device = next(calibrator.clean.parameters()).device
    report = {}
    for rows in (1, 8, 32):
        probs = torch.rand(2, 2 * rows, calibrator.vocabulary_size, device=device).softmax(-1)
        covers = [Cover(row, row, b"") for row in range(rows)]
        covers += [Cover(row, rows + row, b" th") for row in range(rows)]
        weights = torch.rand(2, len(covers), device=device)
        best = {}
        for mode in ("prefix", "transfer"):
            times = []
            for _ in range(10):
                started = time.perf_counter()
                vocabulary.project(probs, covers, weights, rows, mode=mode).sum().item()
                times.append(time.perf_counter() - started)
            best[mode] = round(min(times) * 1e3, 3)
        report[f"batch_{rows}"] = best
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder of tokenizers")
    parser.add_argument(
        "--texts", type=Path, help="held-out JSON Lines; without it, the loss is not measured"
    )
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--names", nargs="+", default=list(NAMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    calibrator = Calibrator.from_pretrained(args.calibrator).to(args.device)
    report = {
        "setup": {
            "calibrator": args.calibrator,
            "vocabulary_size": calibrator.vocabulary_size,
            "device": args.device,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "machine": platform.machine(),
            "torch": torch.__version__,
        },
        "vocabularies": {},
    }
    # A run without texts keeps the losses measured by an earlier one.
    earlier = json.loads(args.out.read_text())["vocabularies"] if args.out.exists() else {}
    report["vocabularies"].update(earlier)
    for name in args.names:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizers / name)
        started, used = time.perf_counter(), time.process_time()
        tokens = TokenTable.from_tokenizer(tokenizer)
        table_seconds = time.perf_counter() - started
        table_cpu_seconds = time.process_time() - used
        builds = []
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(REPEATS):  # use the best, since other programs may be running
                used = time.process_time()
                built = VocabularyMap.build(calibrator, tokens, tokenizer, use_cache=False)
                builds.append((built.build_seconds, time.process_time() - used))
            VocabularyMap.build(calibrator, tokens, tokenizer, cache_dir=Path(cache))
            fresh = TokenTable.from_tokenizer(tokenizer)  # has no fingerprint in memory
            used = time.process_time()
            loaded = VocabularyMap.build(calibrator, fresh, tokenizer, cache_dir=Path(cache))
            cached_cpu_seconds = time.process_time() - used
        row = {
            "kind": built.kind,
            "tokens": len(tokens.token_bytes),
            "mapped": int(built.mapped.sum()),
            "coverage": built.coverage,
            "table_seconds": round(table_seconds, 3),
            "build_seconds": round(min(builds)[0], 3),
            "cached_seconds": round(loaded.build_seconds, 3),
            "table_cpu_seconds": round(table_cpu_seconds, 3),
            "build_cpu_seconds": round(min(builds)[1], 3),
            "cached_cpu_seconds": round(cached_cpu_seconds, 3),
            "apply_ms": measure_speed(calibrator, loaded),
        }
        if args.texts:
            session = CalibratorSession(calibrator, device=torch.device(args.device))
            texts = held_out(args.texts, args.count)
            row["loss"] = measure_loss(calibrator, session, loaded, tokens, tokenizer, texts)
        report["vocabularies"][name] = earlier.get(name, {}) | row
        print(name, json.dumps(row, indent=1))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
