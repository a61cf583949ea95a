r"""What fusion does to a target: less toxic text, at which price in fluency and change.

    python benchmarks/effect.py --target examples/demo_target/model --calibrator english-16k \
        --prompts DATA/rtp_challenging.jsonl --text WORK/test_general.jsonl \
        base default wordfilter mixture:strength=0.2 contrast:strength=2,kl_budget=0.5

A setting is ``base``, ``wordfilter``, ``default`` (the calibrator's own settings), or a rule with
changes to these: ``contrast:name=value,…``; ``mixture`` and ``product`` start from plausibility 0
and no budget, as they are plain. ``RULE@CALIBRATOR:…`` takes another calibrator. ``base`` always
runs. Every sample goes to ``--raw`` (JSON Lines); what is there already is not run again, and
``--out`` is always made from all of it. Samples of one batch share their seed across settings.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import measures
import torch
from effect_report import read_raw, show, write_results
from rich.console import Console
from rich.progress import track
from scorers import SCORERS, Scorer
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from word_filter import WordFilter, tokenisations, word_list

err = Console(stderr=True)


def digest(chunks: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()[:16]


def weights_digest(*models: Any) -> str:
    return digest(
        value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for model in models
        if model is not None
        for _, value in sorted(model.state_dict().items())
    )


def read_prompts(path: Path, limit: int | None) -> list[str]:
    """``{"prompt": "…"}`` or RealToxicityPrompts' ``{"prompt": {"text": "…"}}``."""
    with path.open(encoding="utf-8") as lines:
        found = [json.loads(line)["prompt"] for line in lines]
    return [p["text"] if isinstance(p, dict) else p for p in found][:limit]


def parse_setting(spec: str, calibrator: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """Rule, calibrator and changed settings of ``rule@calibrator:name=value,…``."""
    head, _, changes = spec.partition(":")
    rule, _, other = head.partition("@")
    if rule not in ("base", "wordfilter", "default", "contrast", "mixture", "product"):
        raise SystemExit(f"{spec!r}: unknown setting {rule!r}")
    values: dict[str, Any] = {}
    for change in filter(None, changes.split(",")):
        name, _, value = change.partition("=")
        try:
            values[name] = None if value == "none" else float(value)
        except ValueError:
            values[name] = value
    return rule, other or calibrator, values


class Bench:
    """A target, its prompts, and how text is sampled and judged."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer: Any = AutoTokenizer.from_pretrained(args.target)
        self.model: Any = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
        self.model.to(args.device).eval()
        self.pad = next(
            token
            for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            if token is not None
        )
        limit = self.model.config.max_position_embeddings - args.tokens
        self.prompts = read_prompts(args.prompts, args.limit)
        self.encoded = [
            list(self.tokenizer(prompt)["input_ids"])[-limit:] or [self.pad]
            for prompt in self.prompts
        ]
        self.texts: dict[str, list[list[int]]] = {}
        if args.text:
            with args.text.open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            for source in args.sources:
                kept = [r["text"] for r in rows if r.get("source", source) == source]
                encoded = [list(self.tokenizer(text, verbose=False)["input_ids"]) for text in kept]
                encoded = [ids for ids in encoded if len(ids) >= args.text_tokens]
                self.texts[source] = encoded[: args.texts]
        self._calibrators: dict[str, tuple[Any, str]] = {}
        self._scorers: dict[str, Scorer] = {}
        self.setup = {
            "target": {
                "name": Path(args.target).name,
                "weights": weights_digest(self.model),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "vocabulary": len(self.tokenizer),
            },
            "prompts": {
                "file": args.prompts.name,
                "sha256": digest([args.prompts.read_bytes()]),
                "count": len(self.prompts),
            },
            "samples": args.samples,
            "tokens": args.tokens,
            "top_p": args.top_p,
            "temperature": 1.0,
            "seed": args.seed,
            "batch": args.batch,
            "scorers": list(args.scorers),
            "text": {source: len(ids) for source, ids in self.texts.items()},
            "text_tokens": args.text_tokens,
        }
        self.key = digest([json.dumps(self.setup, sort_keys=True).encode()])

    def calibrator(self, name: str | None) -> tuple[Any, str]:
        from fusion_detox import Calibrator

        if name is None:
            raise SystemExit("this setting needs --calibrator")
        if name not in self._calibrators:
            loaded = Calibrator.from_pretrained(name)
            self._calibrators[name] = loaded, weights_digest(loaded.clean, loaded.reference)
        return self._calibrators[name]

    def processor(self, spec: str) -> tuple[Any, dict[str, Any]]:
        """The logits processor of a setting, and what to write about it."""
        rule, name, changes = parse_setting(spec, self.args.calibrator)
        if rule == "base":
            return None, {}
        if rule == "wordfilter":
            sequences = tokenisations(self.tokenizer, word_list())
            version = importlib.metadata.version("better-profanity")
            words = {"words": len(word_list()), "sequences": len(sequences)}
            return WordFilter(sequences), {"list": f"better-profanity {version}", **words}
        from fusion_detox import FusionConfig, FusionLogitsProcessor

        calibrator, weights = self.calibrator(name)
        config = calibrator.config
        if rule == "contrast":
            config = config.replace(rule=rule, **changes)
        elif rule != "default":
            plain = FusionConfig(rule=rule, strength=0.5, plausibility=0.0)  # type: ignore[arg-type]
            config = plain.replace(**changes)
        processor = FusionLogitsProcessor(calibrator, self.tokenizer, config, pad_token_id=self.pad)
        about = {
            "config": config.to_dict(),
            "calibrator": {"name": Path(str(name)).name, "weights": weights},
            "map": processor.vocabulary.kind,
            "coverage": round(float(processor.vocabulary.coverage), 6),
        }
        return processor, about

    def identity(self, spec: str) -> str:
        """What a setting's raw rows are found by."""
        rule, name, changes = parse_setting(spec, self.args.calibrator)
        weights = "" if rule in ("base", "wordfilter") else self.calibrator(name)[1]
        config = self.calibrator(name)[0].config.to_dict() if weights else {}
        identity = [self.key, rule, weights, sorted(changes.items()), sorted(config.items())]
        return digest([json.dumps(identity, default=str).encode()])

    @torch.inference_mode()
    def sample(self, processor: Any, label: str) -> tuple[list[list[list[int]]], float]:
        """Continuations by prompt and sample, and tokens a second."""
        order = sorted(range(len(self.encoded)), key=lambda row: len(self.encoded[row]))
        starts = range(0, len(order), self.args.batch)
        results: list[list[list[int]]] = [[] for _ in order]
        seconds, written = 0.0, 0
        for start in track(starts, description=label[:40], console=err):
            rows = order[start : start + self.args.batch]
            longest = max(len(self.encoded[row]) for row in rows)
            missing = [longest - len(self.encoded[row]) for row in rows]
            ids = torch.tensor(
                [[self.pad] * m + self.encoded[row] for m, row in zip(missing, rows, strict=True)]
            )
            mask = torch.tensor([[0] * m + [1] * (longest - m) for m in missing])
            torch.manual_seed(self.args.seed * 100_003 + start)
            began = time.perf_counter()
            output = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                do_sample=True,
                top_p=self.args.top_p,
                top_k=0,
                temperature=1.0,
                max_new_tokens=self.args.tokens,
                num_return_sequences=self.args.samples,
                pad_token_id=self.pad,
                use_cache=True,
                logits_processor=LogitsProcessorList([processor] if processor else []),
            )
            seconds += time.perf_counter() - began
            for index, new in enumerate(output[:, longest:].tolist()):
                stops = {self.pad, self.tokenizer.eos_token_id}
                end = next((i for i, token in enumerate(new) if token in stops), len(new))
                results[rows[index // self.args.samples]].append(new[:end])
                written += end
        return results, written / max(seconds, 1e-9)

    def run(self, spec: str) -> list[dict[str, Any]]:
        """All raw rows of a setting, the last of which closes it."""
        processor, about = self.processor(spec)
        began = time.perf_counter()
        sampled, rate = self.sample(processor, spec)
        flat = [(p, s, ids) for p, ids_ in enumerate(sampled) for s, ids in enumerate(ids_)]
        # The prompt's last word counts for the spelling of the first new one, so both are decoded.
        texts = []
        for prompt, _, ids in flat:
            before = self.tokenizer.decode(self.encoded[prompt], skip_special_tokens=True)
            whole = self.tokenizer.decode(self.encoded[prompt] + ids, skip_special_tokens=True)
            texts.append(whole[len(before) :])
        nll = measures.continuation_nll(
            self.model, [self.encoded[p] for p, _, _ in flat], [ids for _, _, ids in flat], 64
        )
        identity = self.identity(spec)
        rows: list[dict[str, Any]] = [
            {"id": identity, "prompt": p, "sample": s, "ids": ids, "text": text, "nll": round(n, 4)}
            for (p, s, ids), text, n in zip(flat, texts, nll, strict=True)
        ]
        for name in self.args.scorers:
            if name not in self._scorers:
                self._scorers[name] = SCORERS[name]()
            for row, score in zip(rows, self._scorers[name].score(texts), strict=True):
                row[name] = round(score, 5)
        change = {
            source: measures.change_on_text(
                self.model, processor, ids, self.args.text_tokens, self.args.batch
            )
            for source, ids in self.texts.items()
            if processor is not None
        }
        about |= {"change": change, "tokens_per_second": round(rate, 1)}
        about["seconds"] = round(time.perf_counter() - began, 1)
        rows.append({"id": identity, "setup": self.key, "setting": spec, "about": about})
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", default=["default"])
    parser.add_argument("--target", required=True, help="folder of the target")
    parser.add_argument("--calibrator", help="path, hub id or shipped name")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="use the first prompts only")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="prompts at a time")
    parser.add_argument("--scorers", nargs="+", default=list(SCORERS), choices=list(SCORERS))
    parser.add_argument("--text", type=Path, help="JSON Lines for the change on harmless text")
    parser.add_argument("--sources", nargs="+", default=["general"], help='its "source" fields')
    parser.add_argument("--texts", type=int, default=64, help="texts of each source")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    default_out = Path(__file__).parent / "results" / "effect.json"
    parser.add_argument("--out", type=Path, default=default_out)
    parser.add_argument("--raw", type=Path, help="by default beside --out, with .raw.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    raw = args.raw or args.out.with_suffix(".raw.jsonl")
    raw.parent.mkdir(parents=True, exist_ok=True)

    bench = Bench(args)
    machine = {"threads": args.threads, "device": args.device}
    for spec in dict.fromkeys(["base", *args.settings]):
        if bench.identity(spec) in read_raw(raw, bench.key):
            err.print(f"{spec}: already there")
            continue
        rows = bench.run(spec)
        with raw.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_results(args.out, bench.setup, read_raw(raw, bench.key), **machine)
    results = write_results(args.out, bench.setup, read_raw(raw, bench.key), **machine)
    show(results, args.scorers)


if __name__ == "__main__":
    main()
