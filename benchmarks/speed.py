"""Measure the cost of fusion: time per step of plain and of fused ``generate()``.

    python -m benchmarks.speed --text DATA/general.jsonl.gz
    python -m benchmarks.speed --text … --targets smollm2 --peers --out smollm2_peers
    python -m benchmarks.speed --text … --targets 7B --device cuda --dtype bfloat16 --out gpu

The runs of a cell take turns, and a cell's ratio is that of the medians of all steps, with a 95 %
interval from resampling the turns. Greedy runs are forced to write a real text, so that both write
the same. Beyond 64 tokens of context, the target's cache starts filled with zeros, since a prefill
costs both the same. The same command resumes: cells that RESULTS/speed/OUT.json has are kept.

Each cell also has the processor's own step, split into its parts, and counts of what it launches
and of how often it waits for the device (on a CPU: of what would launch or wait on a GPU).
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks import speed_targets as targets
from fusion_detox import Calibrator, FusionLogitsProcessor
from fusion_detox.decoding.session import CalibratorSession
from fusion_detox.decoding.text_context import Covers, TextContext
from fusion_detox.evaluation.machine import machine_facts, versions
from fusion_detox.files.atomic import write_whole
from fusion_detox.generation.sampling import pad_token_id
from fusion_detox.training.data.corpus import read_rows
from fusion_detox.vocabulary.map import VocabularyMap

RESULTS = Path(__file__).parent / "results" / "speed"
PREFILL = 64
"""Tokens of context up to which the target reads a real prompt."""
VIEWS = {
    "view", "_unsafe_view", "expand", "transpose", "permute", "slice", "select", "split",
    "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze", "t", "as_strided", "alias",
    "detach", "_reshape_alias", "empty", "new_empty", "empty_strided", "lift_fresh",
}  # fmt: skip
"""Operations that launch nothing on a GPU."""
WAITS = {"_local_scalar_dense", "nonzero", "repeat_interleave"}
"""Operations whose result's value or size the host needs; on a GPU it waits for them."""


class Cell(NamedTuple):
    """What is measured: a target, how it generates, and for how many rows of which length."""

    target: str
    mode: str
    batch: int
    context: int

    @property
    def rows(self) -> int:
        """Rows that a processor sees."""
        return self.batch * (4 if self.mode == "beams" else 1)


class Forced(LogitsProcessor):
    """Forces a given text, regardless of the scores."""

    def __init__(self, texts: Tensor) -> None:
        self._texts = texts
        self._rows = torch.arange(len(texts), device=texts.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[self._rows, self._texts[:, input_ids.shape[1]]] = 1e4
        return scores


class Clock(StoppingCriteria):
    """Records when each token is finished."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times = [self._now()]

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self._times.append(self._now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=self._device)

    def steps(self) -> list[float]:
        """Seconds of each step except the first, which includes preparation."""
        return [after - before for before, after in pairwise(self._times[1:])]


class Split:
    """Seconds that the parts of the processor's step take."""

    PARTS = (
        (TextContext, "read", "text"), (Covers, "weights", "map"), (VocabularyMap, "gather", "map"),
        (CalibratorSession, "read", "forward"), (FusionLogitsProcessor, "__call__", "step"),
    )  # fmt: skip

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._now: Counter[str] = Counter()

    @contextmanager
    def measuring(self, device: torch.device) -> Iterator[None]:
        """Measures the parts of all steps inside the block."""
        kept = [(owner, name, getattr(owner, name)) for owner, name, _ in self.PARTS]
        for owner, name, part in self.PARTS:
            setattr(owner, name, self._timed(getattr(owner, name), part, device))
        try:
            yield
        finally:
            for owner, name, method in kept:
                setattr(owner, name, method)

    def _timed(self, method: Callable[..., Any], part: str, device: torch.device) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            result = method(*args, **options)
            if device.type == "cuda":
                torch.cuda.synchronize()
            self._now[part] += time.perf_counter() - began
            if part == "step":
                whole = self._now.pop("step")
                for name in ("text", "forward", "map"):
                    self.seconds[name].append(self._now[name])
                self.seconds["rule"].append(whole - sum(self._now.values()))
                self.seconds["step"].append(whole)
                self._now.clear()
            return result

        return timed


class Operations(TorchDispatchMode):
    """Counts the operations that launch something on a GPU, and those that it must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = self.waited = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.launched += name not in VIEWS
        self.waited += name in WAITS
        return func(*args, **(kwargs or {}))


def write(
    model: Any, processors: list[Any], texts: Tensor, cell: Cell, tokens: int, pad: int
) -> list[float]:
    """Seconds of each step of one run."""
    ids = texts[: cell.batch, : cell.context]
    options: dict[str, Any] = {"do_sample": cell.mode == "sampling"}
    if cell.mode == "sampling":
        options["top_p"] = 0.9
        torch.manual_seed(0)
    elif cell.mode == "beams":
        options["num_beams"] = 4
    else:
        processors = [*processors, Forced(texts[: cell.batch])]
    if cell.context > PREFILL:
        options["past_key_values"] = targets.full_cache(model, cell.batch, cell.context - 1)
    clock = Clock(model.device)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    return clock.steps()


def ratio(above: list[list[float]], below: list[list[float]]) -> list[float]:
    """The ratio of the medians, and a 95 % interval from resampling the turns."""
    draw = np.random.default_rng(0)
    up, down = np.array(above), np.array(below)
    found = [float(np.median(up) / np.median(down))]
    turns = draw.integers(0, len(up), (2000, len(up)))
    drawn = np.median(up[turns].reshape(2000, -1), 1) / np.median(down[turns].reshape(2000, -1), 1)
    return [round(value, 3) for value in (*found, *np.percentile(drawn, [2.5, 97.5]))]


def milliseconds(runs: list[list[float]]) -> float:
    return round(float(np.median(runs)) * 1000, 3)


def measure(
    cell: Cell,
    model: Any,
    methods: dict[str, Callable[[], Any]],
    texts: Tensor,
    pad: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Plain runs and those of each method, which take turns.

    Args:
        cell: How to generate.
        model: The target.
        methods: Processors by name, each made anew for a turn, or a context manager of one.
        texts: ``(rows, length)``.
        pad: The padding id.
        args: ``tokens``, ``turns`` and ``cell_seconds``.
    """
    runs: dict[str, list[list[float]]] = {name: [] for name in ("plain", *methods)}
    began = time.perf_counter()
    for turn in range(args.turns + 1):
        for name in runs:
            if name == "plain":
                steps = write(model, [], texts, cell, args.tokens, pad)
            else:
                with methods[name]() as processor:
                    steps = write(model, [processor], texts, cell, args.tokens, pad)
            if turn:  # the first one warms up
                runs[name].append(steps)
        if turn >= 2 and time.perf_counter() - began > args.cell_seconds:
            break
    found: dict[str, Any] = {**cell._asdict(), "turns": len(runs["plain"])}
    found["plain_ms"] = milliseconds(runs["plain"])
    for name in methods:
        found[name] = {
            "ms": milliseconds(runs[name]), "ratio": ratio(runs[name], runs["plain"])
        }  # fmt: skip
    return found


def own_step(processor: Any, texts: Tensor, cell: Cell, model: Any) -> dict[str, Any]:
    """The processor's own step on given scores, by part, and its counts."""
    split, rows = Split(), min(len(texts), cell.rows)
    width = model.config.vocab_size
    ids = texts[:rows, : cell.context + 20]
    with torch.inference_mode():
        context = ids[:, max(0, cell.context - 32) : cell.context]
        one = model(input_ids=context, logits_to_keep=1).logits[:, -1].float()
        processor.reset()
        processor(ids[:, : cell.context], one)
        processor(ids[:, : cell.context + 1], one)
        with split.measuring(model.device):
            for length in range(cell.context + 2, cell.context + 19):
                processor(ids[:, :length], one)
        with Operations() as counted:
            processor(ids[:, : cell.context + 19], one)
    found: dict[str, Any] = {
        f"{name}_ms": round(float(np.median(own)) * 1000, 3) for name, own in split.seconds.items()
    }
    return {**found, "rows": rows, "vocabulary": width, "launches": counted.launched,
            "waits": counted.waited}  # fmt: skip


def rows_of_text(tokenizer: Any, path: Path, rows: int, length: int) -> Tensor:
    """Consecutive slices of the texts in a file, ``(rows, length)`` tokens."""
    ids: list[int] = []
    for row, _ in read_rows(path):
        ids += tokenizer(row["text"] + "\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= rows * length:
            return torch.tensor(ids[: rows * length]).view(rows, length)
    raise SystemExit(
        f"{path} has {len(ids)} tokens, but {rows * length} are needed: give more text"
    )


def plan(args: argparse.Namespace) -> list[Cell]:
    """The cells: every batch size at the shortest context; other modes and contexts at one."""
    found = []
    for target in args.targets:
        found += [Cell(target, "greedy", batch, args.contexts[0]) for batch in args.batches]
        found += [Cell(target, "greedy", args.batches[0], context) for context in args.contexts[1:]]
        if target in targets.REAL:
            for mode in args.modes:
                if mode != "greedy":
                    batch = 8 if mode == "sampling" else 2
                    found.append(Cell(target, mode, batch, args.contexts[0]))
    return found


def table(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    methods = list(dict.fromkeys(
        name for cell in document["cells"] for name in cell if isinstance(cell[name], dict)
        and name != "own"
    ))  # fmt: skip
    setup = document["setup"]
    machine = f"{setup['machine']['device']}, {setup['threads']} threads, {setup['dtype']}"
    columns = ["target", "mode", "batch", "context", "plain, ms", *methods, "limit"]
    columns += ["own step, ms (text, forward, map, rule)", "launches, waits"]
    lines = [
        f"{machine}. Time per step over that of plain `generate()`, with 95 % intervals.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for cell in document["cells"]:
        own = cell["own"]
        cells = [cell["target"], cell["mode"], str(cell["batch"]), str(cell["context"])]
        cells.append(f"{cell['plain_ms']:.1f}")
        for name in methods:
            found = cell.get(name)
            cells.append("" if found is None else "{:.2f} ({:.2f}–{:.2f})".format(*found["ratio"]))
        cells.append(f"{cell['limit']:.3f}")
        parts = ", ".join(f"{own[f'{part}_ms']:.1f}" for part in ("text", "forward", "map", "rule"))
        cells.append(f"{own['step_ms']:.1f} ({parts})")
        cells.append(f"{own['launches']}, {own['waits']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(document: dict[str, Any], path: Path) -> None:
    """The ratio against the batch, and the processor's own step against the vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    cells = [cell for cell in document["cells"] if cell["mode"] == "greedy"]
    shortest = min(cell["context"] for cell in cells)
    cells = [cell for cell in cells if cell["context"] == shortest]
    for target in dict.fromkeys(cell["target"] for cell in cells):
        own = [cell for cell in cells if cell["target"] == target]
        for name in own[0]:
            if isinstance(own[0][name], dict) and name != "own":
                label = target if name == "fused" else f"{target}, {name}"
                line = [cell[name]["ratio"] for cell in own if name in cell]
                batches = [cell["batch"] for cell in own if name in cell]
                low = [middle - below for middle, below, _ in line]
                high = [above - middle for middle, _, above in line]
                middle = [value for value, _, _ in line]
                left.errorbar(batches, middle, [low, high], marker="o", label=label, capsize=2)
    left.set_xscale("log", base=2)
    left.axhline(1, color="grey", linewidth=0.8)
    left.set_xlabel("batch")
    left.set_ylabel("time per step, relative to plain")
    left.legend(fontsize=7)
    for batch in dict.fromkeys(cell["batch"] for cell in cells):
        points = sorted(
            {cell["own"]["vocabulary"]: cell["own"]["step_ms"] for cell in cells
             if cell["batch"] == batch}.items()
        )  # fmt: skip
        right.plot(*zip(*points, strict=True), marker="o", label=f"batch {batch}")
    right.set_xlabel("target's vocabulary")
    right.set_ylabel("the processor's own step, ms")
    right.set_ylim(bottom=0)
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help='JSON Lines with "text"')
    parser.add_argument("--calibrator", default="english-16k")
    choices = [*targets.REAL, *targets.RANDOM]
    usual = [name for name in choices if name != "7B"]
    parser.add_argument("--targets", nargs="+", default=usual, choices=choices)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[32, 512, 4096])
    parser.add_argument(
        "--modes", nargs="+", default=["sampling", "beams"],
        choices=["greedy", "sampling", "beams"], help="of real targets, besides greedy",
    )  # fmt: skip
    parser.add_argument("--peers", action="store_true", help="measure other methods too")
    parser.add_argument("--overlap", action="store_true", help="measure overlap() too")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=6, help="maximum turns per cell")
    parser.add_argument(
        "--cell-seconds", type=float, default=60, help="start no further turn after this time"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="real", help="name of the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


@contextmanager
def _made(make: Callable[[], Any]) -> Iterator[Any]:
    yield make()


def methods_of(
    model: Any, tokenizer: Any, processor: FusionLogitsProcessor, pad: int, args: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """What is measured besides plain runs, as functions that give context managers."""

    def fused() -> Any:
        processor.reset()  # each turn reads its context again, like a new text
        return _made(lambda: processor)

    def overlapped() -> Any:
        processor.reset()
        return processor.overlap(model)

    methods: dict[str, Callable[[], Any]] = {"fused": fused}
    if args.overlap:
        methods["fused, overlap()"] = overlapped
    if args.peers:
        for name, make in targets.peers(model, tokenizer, processor.calibrator, pad).items():
            methods[name] = functools.partial(_made, make)
    return methods


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    disable_progress_bar()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    json_path = RESULTS / f"{args.out}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    setup = {
        "calibrator": args.calibrator, "tokens": args.tokens, "threads": args.threads,
        "dtype": args.dtype, "machine": machine_facts(device), "versions": versions(),
    }  # fmt: skip
    document: dict[str, Any] = {"setup": setup, "cells": []}
    if json_path.exists():
        kept = json.loads(json_path.read_text("utf-8"))
        if kept["setup"] != json.loads(json.dumps(setup)):
            raise SystemExit(
                f"{json_path} was measured with other settings or versions: give another --out, "
                "or delete it"
            )
        document = kept
    done = {tuple(cell[name] for name in Cell._fields) for cell in document["cells"]}
    loaded = ""
    for cell in plan(args):
        if tuple(cell) in done:
            continue
        if cell.target != loaded:
            model, tokenizer = targets.make_target(cell.target, device, dtype)
            loaded, pad = cell.target, pad_token_id(model, tokenizer)
            calibrator = Calibrator.from_pretrained(args.calibrator)
            processor = FusionLogitsProcessor(calibrator, tokenizer, pad_token_id=pad)
            methods = methods_of(model, tokenizer, processor, pad, args)
            guides = [one for one in (calibrator.clean, calibrator.reference) if one is not None]
            own = sum(map(targets.moved_bytes, guides))
        rows = max(cell.rows, 1)
        texts = rows_of_text(tokenizer, args.text, rows, cell.context + max(args.tokens, 20) + 1)
        texts = texts.to(device)
        with torch.inference_mode():
            found = measure(cell, model, methods, texts, pad, args)
        read = targets.moved_bytes(model)
        passes = 2 * cell.rows * model.config.vocab_size * 4
        found["limit"] = round((read + own + passes) / read, 4)
        found["own"] = own_step(processor, texts, cell, model)
        document["cells"].append(found)
        write_whole(json_path, json.dumps(document, indent=1).encode() + b"\n")
        print(json.dumps(found), flush=True)
    text = table(document)
    write_whole(RESULTS / f"{args.out}.md", text.encode())
    plot(document, RESULTS / f"{args.out}.png")
    print(text)


if __name__ == "__main__":
    main()
