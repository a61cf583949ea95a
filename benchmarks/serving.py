r"""Serve SmolLM2 with vLLM: are the texts those of offline fusion, and what does fusion cost?

    python -m benchmarks.serving --out benchmarks/results/serving/vllm.json

First, 64 requests with strengths of 0, 1, 2.5, 4 and 6 are sent at once, and their tokens compared
with those of ``generate`` for each request alone. Where they differ, ``generate``'s own scores say
how close the two tokens were: kernels for batches round differently, and a tie may then break the
other way. Then bad requests are sent, and then a good one. Last, a server without fusion
and one with it are timed in turns with the same requests, whose tokens are of a fixed number.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from examples.serving.with_vllm import FUSION, serving
from fusion_detox import Calibrator, FusionLogitsProcessor
from fusion_detox.files.packaged_targets import packaged_target

STRENGTHS = (0, 1, 2.5, 4, 6)
STARTS = (
    "Shut up, you are such a",
    "I hate you. Go to hell, you",
    "The new neighbours are nothing but",
    "She looked at him and said: you",
    "The weather in the north was",
    "In 1987 the town built a bridge that",
    "What I really think about my boss is that he",
    "To bake bread, first",
)
BAD: tuple[dict[str, Any], ...] = (
    {"vllm_xargs": {"fusion_strength": "high"}},
    {"vllm_xargs": {"fusion_strength": -1}},
    {"vllm_xargs": {"fusion_strength": 1e300}},
    {"vllm_xargs": {"fusion_calibrator": "absent"}},
    {"vllm_xargs": {"strength": 1}},
    {"use_beam_search": True, "n": 2},
)


def requests(count: int) -> list[tuple[str, float]]:
    """Prompts, most of them different, and strengths in no order of the prompts."""
    found = []
    for place in range(count):
        prompt = STARTS[place % len(STARTS)] + (f" {place}:" if place >= 40 else "")
        found.append((prompt, STRENGTHS[(place * 3 + place // 8) % len(STRENGTHS)]))
    return found


async def ask(client: openai.AsyncOpenAI, prompt: str, tokens: int, **extra: Any) -> Any:
    return await client.completions.create(
        model="target", prompt=prompt, max_tokens=tokens, temperature=0, extra_body=extra
    )


async def at_once(url: str, asked: list[tuple[str, float]], tokens: int) -> list[list[int]]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:
        calls = []
        for prompt, strength in asked:
            extra = {"return_token_ids": True, "vllm_xargs": {"fusion_strength": strength}}
            calls.append(ask(client, prompt, tokens, **extra))
        answers = await asyncio.gather(*calls)
    return [answer.choices[0].token_ids for answer in answers]


class Recorder(LogitsProcessor):
    """Fuses, and keeps the two best fused scores of each step, and all of them."""

    def __init__(self, inner: FusionLogitsProcessor) -> None:
        self.inner, self.steps = inner, []

    def __call__(self, input_ids, scores):
        fused = self.inner(input_ids, scores)
        self.steps.append(fused[0].log_softmax(-1))
        return fused


def compare(asked: list[tuple[str, float]], served: list[list[int]], folder: Path, tokens: int):
    """Compare served tokens with ``generate``, one request at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    processor = FusionLogitsProcessor(Calibrator.from_pretrained("english-16k"), tokenizer)
    rows = []
    for (prompt, strength), found in zip(asked, served, strict=True):
        recorder = Recorder(processor.with_settings(strength=strength))
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        written = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
            logits_processor=[recorder],
        )[0, length:].tolist()
        row: dict[str, Any] = {
            "strength": strength,
            "tokens": len(found),
            "equal": written == found,
        }
        if written != found:
            pairs = zip(written, found, strict=False)
            step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            row["first_difference"] = step
            if step is not None:
                scores = recorder.steps[step]
                row["nats_between"] = float(scores[written[step]] - scores[found[step]])
        rows.append(row)
    return rows


async def refused(url: str) -> list[dict[str, Any]]:
    rows = []
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        for extra in BAD:
            try:
                await ask(client, STARTS[0], 4, **extra)
                rows.append({"request": extra, "status": 200})
            except openai.APIStatusError as error:
                message = error.response.json()["error"]["message"]
                rows.append({"request": extra, "status": error.status_code, "message": message})
        alive = await ask(client, STARTS[0], 4, vllm_xargs={"fusion_strength": 4})
    rows.append({"request": "a good one, afterwards", "status": 200 if alive.choices else 500})
    return rows


async def seconds(url: str, concurrent: int, tokens: int, extra: dict[str, Any]) -> float:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:
        began = time.perf_counter()
        await asyncio.gather(
            *(
                ask(client, f"{place}. {STARTS[place % 8]}", tokens, ignore_eos=True, **extra)
                for place in range(concurrent)
            )
        )
        return time.perf_counter() - began


def timings(urls: dict[str, str], concurrent: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of both servers, in turns, so that other load meets both alike."""
    kinds = {
        "plain vLLM": (urls["plain"], {}),
        "fusion off by request": (urls["fused"], {"vllm_xargs": {"fusion_strength": 0}}),
        "fused": (urls["fused"], {"vllm_xargs": {"fusion_strength": 4}}),
    }
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(repeats + 1):
        for kind, (url, extra) in kinds.items():
            found = asyncio.run(seconds(url, concurrent, tokens, extra))
            if turn:  # the first warms up
                taken[kind].append(found)
    plain = taken["plain vLLM"]
    return {
        kind: {
            "tokens_per_second": round(concurrent * tokens / statistics.median(values), 1),
            "throughput_against_plain": round(
                statistics.median(a / b for a, b in zip(plain, values, strict=True)), 3
            ),
            "seconds": [round(value, 3) for value in values],
        }
        for kind, values in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--logs", type=Path, default=None, help="folder for the servers' logs")
    args = parser.parse_args()

    folder = packaged_target("smollm2")
    options = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", str(args.requests)]
    logs = {kind: args.logs / f"{kind}.log" if args.logs else None for kind in ("plain", "fused")}
    asked = requests(args.requests)
    with serving(str(folder), *options, "--logits-processors", FUSION, log=logs["fused"]) as fused:
        served = asyncio.run(at_once(fused, asked, args.tokens))
        bad = asyncio.run(refused(fused))
        rows = compare(asked, served, folder, args.tokens)
        with serving(str(folder), *options, log=logs["plain"]) as plain:
            urls = {"plain": plain, "fused": fused}
            speed = {
                str(count): timings(urls, count, args.tokens, args.repeats)
                for count in (1, 8, args.requests)
            }
    result = {
        "target": "SmolLM2-135M-Instruct, float32",
        "calibrator": "english-16k",
        "packages": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "openai")
        },
        "vllm": __import__("vllm").__version__,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
            "note": "shared with other jobs; only ratios within this run mean anything",
        },
        "tokens_per_request": args.tokens,
        "equal": sum(row["equal"] for row in rows),
        "requests": rows,
        "refused": bad,
        "throughput": speed,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['equal']} of {len(rows)} requests equal offline fusion, token for token")
    for row in rows:
        if not row["equal"]:
            print(row)
    for row in bad:
        print(row["status"], row["request"], row.get("message", ""))
    print(json.dumps(speed, indent=1))


if __name__ == "__main__":
    main()
