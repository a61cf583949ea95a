"""Load damaged calibrators, and see whether any damage goes unnoticed.

    python -m benchmarks.reliability.damaged_calibrators

Each case copies a healthy calibrator, damages it, loads it, and fuses a few rows. Two thirds of the
cases load it as usual; the others without comparing digests (``verify=False``, or a folder without
digests). The outcomes:

- ``error``: an error of the library. ``equal``: it loads and gives the healthy one's numbers.
- ``different``: it loads and gives other numbers. With digests, this is silently wrong.
- ``foreign``: another library's exception. ``crash``, ``hang``, ``memory``: the process died, took
  more than two minutes, or took more than 2 GiB.

The exit code is 1 if a case with digests is different, or any case is foreign, a crash, a hang or
takes too much memory. Every case can be repeated: it depends on the seed and its number only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.lookup import find_calibrator
from fusion_detox.errors import FusionDetoxError
from fusion_detox.files.versions import installed_versions
from fusion_detox.processor import FusionLogitsProcessor

RESULTS = Path(__file__).parents[1] / "results" / "reliability" / "damaged_calibrators.json"
MODES = ("digests", "digests", "verify=False", "digests", "digests", "no digests")
BAD = ("foreign", "crash", "hang", "memory")
_SECONDS = 120
_GIB = 1 << 30
_TEXTS = ["You are such a", "Thank you so much for", "The weather was fine, so"]
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, 1e-300, 10**7),
    *("", "x", "eager", "kernels-community/flash-attn", "../../../etc/passwd", "/dev/zero", "int4"),
    *([], [1], {}, {"x": 1}, "\ud800", float("nan"), float("inf")),
]
_KEYS = [
    *("quantization_config", "transformers_weights", "attn_implementation", "_attn_implementation"),
    *("auto_map", "tokenizer_file", "dtype", "num_experts", "layer_types", "rope_scaling"),
    *("head_dim", "pad_token_id", "added_tokens_decoder", "padding", "truncation", "normalizer"),
    *("tie_word_embeddings", "sliding_window", "text_config", "torch_dtype", "x"),
]

Rng = random.Random
Damage = Callable[[Path, Path, Rng], str]


# --- the healthy calibrators


def make_calibrator(folder: Path, seed: int) -> None:
    """Save a calibrator of two random Llamas with 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(__doc__ or "")[100 * seed :]] * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # peaked distributions, which differ
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pair = [LlamaForCausalLM(config).eval() for _ in range(2)]
    Calibrator(*pair, fast, context_length=32, record={"seed": seed}).save_pretrained(folder)


def numbers(folder: Path, *, verify: bool) -> list[Any]:
    """Everything that a calibrator decides: fused scores, settings and the bytes of tokens."""
    calibrator = Calibrator.from_pretrained(folder, verify=verify)
    processor = FusionLogitsProcessor(calibrator, calibrator.tokenizer)
    rows = [calibrator.tokenizer(text).input_ids for text in _TEXTS]
    width = len(processor.vocabulary.mapped)
    fused = processor.fuse_rows(rows, torch.linspace(-1, 1, width).repeat(len(rows), 1))
    return [
        rows,
        fused.tolist(),
        calibrator.config.to_dict(),
        calibrator.context_length,
        calibrator.bos_id,
        [probe.to_json() for probe in calibrator.probes],
        calibrator.tokens.fingerprint(),
    ]


# --- damages


def _files(folder: Path, *suffixes: str) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not suffixes or path.suffix in suffixes)


def _bytes(change: Callable[[bytearray, Rng], bytes]) -> Damage:
    def damage(folder: Path, _: Path, rng: Rng) -> str:
        path = rng.choice(_files(folder))
        path.write_bytes(change(bytearray(path.read_bytes()), rng))
        return path.relative_to(folder).as_posix()

    return damage


def _flip(data: bytearray, rng: Rng) -> bytes:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _hole(data: bytearray, rng: Rng) -> bytes:
    start = rng.randrange(len(data))
    size = len(data[start : start + rng.choice((16, 512, 4096))])
    data[start : start + size] = bytes(size)
    return bytes(data)


def _exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_files(folder: Path, _: Path, rng: Rng) -> str:
    """Two files of the calibrator change places."""
    name = rng.choice(("model.safetensors", "config.json", "."))
    _exchange(folder / "clean" / name, folder / "reference" / name)
    return name


def foreign_file(folder: Path, other: Path, rng: Rng) -> str:
    """A file is replaced by that of another calibrator."""
    path = rng.choice(_files(other))
    name = path.relative_to(other)
    shutil.copy(path, folder / name)
    return name.as_posix()


def _tensors(change: Callable[[dict[str, torch.Tensor], str, Rng], object]) -> Damage:
    def damage(folder: Path, _: Path, rng: Rng) -> str:
        path = rng.choice(_files(folder, ".safetensors"))
        tensors = load_file(path)
        name = rng.choice(sorted(tensors))
        change(tensors, name, rng)
        save_file(tensors, path, metadata={"format": "pt"})
        return f"{path.relative_to(folder).as_posix()}: {name}"

    return damage


def _swap_tensors(tensors: dict[str, torch.Tensor], name: str, rng: Rng) -> None:
    alike = [n for n in tensors if n != name and tensors[n].shape == tensors[name].shape]
    other = rng.choice(sorted(alike) or [name])
    tensors[name], tensors[other] = tensors[other], tensors[name]


def _fill(tensors: dict[str, torch.Tensor], name: str, rng: Rng) -> None:
    chosen = list(tensors) if rng.random() < 0.3 else [name]
    value = rng.choice((0.0, 0.0, float("nan"), float("inf"), 1e30))
    for one in chosen:
        tensors[one].fill_(value)


def _reshape(tensors: dict[str, torch.Tensor], name: str, rng: Rng) -> None:
    tensor = tensors[name]
    kinds = (tensor.t().contiguous() if tensor.dim() == 2 else tensor[:-1], tensor.int())
    tensors[name] = rng.choice([*kinds, torch.zeros(0), tensor.double()])


def mutate_json(folder: Path, _: Path, rng: Rng) -> str:
    """A value in a JSON file is replaced, removed or added."""
    path = rng.choice(_files(folder, ".json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    places: list[tuple[Any, Any]] = []
    level: list[Any] = [content]
    while level:
        item = level.pop()
        keys: list[Any] = list(item) if isinstance(item, dict) else list(range(len(item)))
        # Of a vocabulary, a few entries are enough.
        keys = keys if len(keys) < 40 else rng.sample(keys, 5)
        places += [(item, key) for key in keys]
        level += [item[key] for key in keys if isinstance(item[key], (dict, list))]
    inner, key = rng.choice(places)
    what = rng.random()
    if what < 0.1:
        del inner[key]
    elif what < 0.3:
        key = rng.choice(_KEYS)
        content[key] = rng.choice(_VALUES)
    else:
        inner[key] = rng.choice(_VALUES)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{path.relative_to(folder).as_posix()}: {key}"


def hostile_json(folder: Path, _: Path, rng: Rng) -> str:
    """A JSON file whose text itself is an attack on parsers."""
    path = rng.choice(_files(folder, ".json"))
    texts = {
        "deep lists": "[" * 100_000 + "]" * 100_000,
        "deep objects": '{"a":' * 300 + "1" + "}" * 300,
        "5,000 digits": '{"hidden_size": ' + "9" * 5_000 + "}",
        "1e999": '{"strength": 1e999}',
        "a list": "[]",
        "a string": '"x"',
    }
    inserted = {
        "deep value": '"x": ' + "[" * 200 + "]" * 200,
        "long value": '"x": ' + "7" * 5_000,
        "half a character": '"x": "\\ud800"',
        "a key twice": '"fusion": {}, "model_type": "gpt2"',
    }
    name = rng.choice(sorted([*texts, *inserted]))
    text = path.read_text(encoding="utf-8").lstrip()
    path.write_text(texts.get(name) or "{" + inserted[name] + "," + text[1:], encoding="utf-8")
    return f"{path.relative_to(folder).as_posix()}: {name}"


def special_file(folder: Path, _: Path, rng: Rng) -> str:
    """A file is replaced by something that is not a file, or removed."""
    path = rng.choice(_files(folder))
    path.unlink()
    kind = rng.choice(("pipe", "device", "loop", "broken link", "socket", "folder", "missing"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/tty")))
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)  # a full path may be too long
    elif kind == "folder":
        path.mkdir()
    return f"{path.relative_to(folder).as_posix()}: {kind}"


def added_file(folder: Path, _: Path, rng: Rng) -> str:
    """A file appears that transformers would read."""
    content = {
        "clean/adapter_config.json": '{"base_model_name_or_path": "x", "peft_type": "LORA"}',
        "clean/model.safetensors.index.json": '{"weight_map": {"x": "model.safetensors"}}',
        "reference/generation_config.json": '{"eos_token_id": 99999999999}',
        "special_tokens_map.json": '{"bos_token": "the"}',
        "added_tokens.json": '{"<new>": 300}',
        "config.json": '{"model_type": "gpt2"}',
        "tokenizer.model": "x",
        "chat_template.jinja": "{{ raise }}",
        "clean/custom_generate/generate.py": "raise SystemExit",
    }
    name = rng.choice(sorted(content))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content[name], encoding="utf-8")
    return name


def tokenizer_parts(folder: Path, _: Path, rng: Rng) -> str:
    """Parts of the tokenizer change, but no token does."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    kind = rng.choice(("merges", "fewer merges", "normalizer", "pre_tokenizer", "ids"))
    if kind == "merges":
        rng.shuffle(values["model"]["merges"])
    elif kind == "fewer merges":
        del values["model"]["merges"][rng.randrange(len(values["model"]["merges"])) :]
    elif kind == "normalizer":
        values["normalizer"] = {"type": "Lowercase"}
    elif kind == "pre_tokenizer":
        values["pre_tokenizer"]["add_prefix_space"] = True
    else:
        vocabulary = values["model"]["vocab"]
        one, other = rng.sample(sorted(vocabulary), 2)
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(values), encoding="utf-8")
    return kind


DAMAGES: dict[str, Damage] = {
    "flipped bit": _bytes(_flip),
    "truncated": _bytes(lambda data, rng: bytes(data[: rng.randrange(len(data))])),
    "value in JSON": mutate_json,
    "zeroed block": _bytes(_hole),
    "appended bytes": _bytes(lambda data, rng: bytes(data) + rng.randbytes(rng.randint(1, 99))),
    "swapped files": swap_files,
    "swapped tensors": _tensors(_swap_tensors),
    "filled tensor": _tensors(_fill),
    "reshaped tensor": _tensors(_reshape),
    "removed tensor": _tensors(lambda tensors, name, _: tensors.pop(name)),
    "another's file": foreign_file,
    "hostile JSON": hostile_json,
    "special file": special_file,
    "added file": added_file,
    "tokenizer": tokenizer_parts,
}


# --- cases


def without_digests(folder: Path) -> None:
    """Turn a calibrator into one of format 1."""
    path = folder / "calibrator.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), "format_version": 1}
    del values["digests"]
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def _peak() -> int:
    """The most memory that this process has used, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_case(number: int, seed: int, bases: list[Path], healthy: list[Any]) -> dict[str, Any]:
    """Damage a copy of the first base, load it, and tell what happened.

    Args:
        number: The case; it decides the damage, and how the calibrator is loaded.
        seed: Seed of all cases.
        bases: The calibrator to damage, and another one.
        healthy: The numbers of the first.
    """
    rng = random.Random(f"{seed}/{number}")
    kind = list(DAMAGES)[number % len(DAMAGES)]
    mode = MODES[number // len(DAMAGES) % len(MODES)]
    peak = _peak()
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(bases[0], Path(temporary) / "calibrator")
        if mode == "no digests":
            without_digests(folder)
        detail, message = DAMAGES[kind](folder, bases[1], rng), ""
        try:
            equal = numbers(folder, verify=mode != "verify=False") == healthy
            outcome = "equal" if equal else "different"
        except FusionDetoxError as error:
            outcome, message = "error", str(error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome, message = "foreign", f"{type(error).__name__}: {error}"
            message += " | " + " | ".join(traceback.format_exc().splitlines()[-7:-1])
        message = message.replace(str(folder), "CALIBRATOR")
        message = message.replace(str(Path(__file__).parents[2]), "REPOSITORY")
    if _peak() - peak > 2 * _GIB:
        outcome = "memory"
    return {
        "number": number,
        "damage": kind,
        "detail": detail,
        "loaded": mode,
        "outcome": outcome,
        "message": message[:300] if outcome not in BAD else message[:1500],
    }


def _worker(work: Path, seed: int, start: int, stop: int) -> None:
    """Run cases, one line before and one after each, so that a death can be blamed on its case."""
    resource.setrlimit(resource.RLIMIT_AS, (16 * _GIB, 16 * _GIB))
    bases = [work / "one", work / "two"]
    healthy = numbers(bases[0], verify=True)
    for number in range(start, stop):
        sys.stdout.write(json.dumps({"begins": number}) + "\n")
        sys.stdout.flush()
        signal.alarm(_SECONDS)  # without a handler, it ends the process
        result = run_case(number, seed, bases, healthy)
        signal.alarm(0)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


def run(work: Path, seed: int, cases: int) -> list[dict[str, Any]]:
    """Run all cases in processes of their own; one that dies is replaced."""
    environment = {**os.environ, "FUSION_DETOX_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    results: list[dict[str, Any]] = []
    while len(results) < cases:
        command = [sys.executable, "-m", "benchmarks.reliability.damaged_calibrators"]
        command += ["--worker", str(work), str(seed), str(len(results)), str(cases)]
        begun = -1
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                values = json.loads(line)
                begun = values.get("begins", begun)
                if "outcome" in values:
                    results.append(values)
        if process.returncode and begun != len(results):
            raise SystemExit("a worker failed outside of its cases")
        if process.returncode:
            results.append(_death(seed, begun, process.returncode))
    return results


def _death(seed: int, number: int, code: int) -> dict[str, Any]:
    outcome = "hang" if code == -signal.SIGALRM else "crash"
    return {
        "number": number,
        "damage": list(DAMAGES)[number % len(DAMAGES)],
        "detail": f"seed {seed}",
        "loaded": MODES[number // len(DAMAGES) % len(MODES)],
        "outcome": outcome,
        "message": f"exit code {code}",
    }


def failures(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases that must not happen."""
    return [
        one
        for one in results
        if one["outcome"] in BAD or (one["outcome"] == "different" and one["loaded"] == "digests")
    ]


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of outcomes, by how the calibrator was loaded and by damage."""

    def counts(key: str, chosen: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
        names = dict.fromkeys(one[key] for one in chosen)
        return {
            name: dict(collections.Counter(o["outcome"] for o in chosen if o[key] == name))
            for name in names
        }

    with_digests = [one for one in results if one["loaded"] == "digests"]
    return {
        "cases": len(results),
        "loaded": counts("loaded", results),
        "damage, with digests": counts("damage", with_digests),
        "failures": len(failures(results)),
    }


def main() -> int:
    """Run the audit; the exit code is 1 if something must not have happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1800, help="damaged tiny calibrators")
    parser.add_argument("--shipped-cases", type=int, default=45, help="damaged english-16k")
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work, *rest = args.worker
        _worker(Path(work), *map(int, rest))
        return 0
    report: dict[str, Any] = {
        "seed": args.seed,
        "versions": installed_versions("torch", "transformers", "tokenizers", "safetensors"),
    }
    bad = []
    for name, cases in (("tiny", args.cases), ("english-16k", args.shipped_cases)):
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            make_calibrator(work / "one", 1)
            make_calibrator(work / "two", 2)
            if name != "tiny":
                shutil.rmtree(work / "one")
                shutil.copytree(find_calibrator(name), work / "one")
            results = run(work, args.seed, cases)
        report[name] = {"summary": summary(results), "cases": results}
        bad += failures(results)
        sys.stdout.write(json.dumps({name: report[name]["summary"]}, indent=2) + "\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for one in bad:
        sys.stdout.write(json.dumps(one) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
