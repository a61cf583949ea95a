"""Damages cached vocabulary maps and saved alignments, and loads them.

    python -m benchmarks.reliability.damaged_caches [--cases 500]

A damaged map must be built again, or its damage must change nothing. A damaged alignment must raise
``AlignmentError``, or its damage must change nothing. Cases run in forked children, so that a crash
is noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.reliability.commands import RESULTS, SEED, World, make_world
from fusion_detox import Calibrator
from fusion_detox.alignment import store
from fusion_detox.alignment.alignment import Alignment, align
from fusion_detox.errors import AlignmentError
from fusion_detox.files.atomic import write_whole
from fusion_detox.files.models import load_target
from fusion_detox.vocabulary.disk_cache import save_map
from fusion_detox.vocabulary.map import Cover, VocabularyMap
from fusion_detox.vocabulary.token_table import TokenTable

_CHILD = 25
_WRONG = (-1, 1 << 30, 400, 1_000_000)
_WRONG_VALUES = (float("nan"), float("inf"), -1.0, 3.0, 1e38)


def flip_bit(path: Path, rng: random.Random) -> None:
    """One flipped bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_bits(path: Path, rng: random.Random) -> None:
    """Up to 50 flipped bits."""
    for _ in range(rng.randint(2, 50)):
        flip_bit(path, rng)


def overwrite(path: Path, rng: random.Random) -> None:
    """A range of random bytes or zeros."""
    data = bytearray(path.read_bytes())
    start, size = rng.randrange(len(data)), rng.randint(1, 4096)
    size = min(size, len(data) - start)
    data[start : start + size] = rng.choice([bytes(size), rng.randbytes(size)])
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    """A lost end."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def lose(path: Path, rng: random.Random) -> None:
    """A lost range in the middle."""
    data = path.read_bytes()
    start = rng.randrange(len(data))
    path.write_bytes(data[:start] + data[start + rng.randint(1, 999) :])


def add(path: Path, rng: random.Random) -> None:
    """Added bytes."""
    data = path.read_bytes()
    start = rng.choice([len(data), rng.randrange(len(data))])
    path.write_bytes(data[:start] + rng.randbytes(rng.randint(1, 999)) + data[start:])


def change_header(path: Path, rng: random.Random) -> None:
    """A changed digit or letter in the text at the start of the file."""
    data = bytearray(path.read_bytes())
    places = [n for n, byte in enumerate(data[:3000]) if chr(byte).isalnum()]
    data[rng.choice(places)] = rng.choice(b"0123456789abcXYZ")
    path.write_bytes(data)


def special(path: Path, rng: random.Random) -> None:
    """Something that is not a regular file."""
    path.unlink()
    kind = rng.choice(["pipe", "device", "folder", "loop", "dangling"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        names: dict[str, str | Path] = {
            "device": "/dev/zero",
            "loop": path,
            "dangling": path.with_name("missing"),
        }
        path.symlink_to(names[kind])


def of_others(path: Path, rng: random.Random) -> None:
    """Permissions with which other users may write it."""
    path.chmod(rng.choice([0o620, 0o602, 0o666, 0o777]))


ANY = (flip_bit, flip_bits, overwrite, truncate, lose, add, change_header, special)


def forge_map(path: Path, rng: random.Random) -> None:
    """A valid digest of values that are out of range or of other sizes."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = rng.choice(["value", "value", "value", "shorter", "longer", "type", "missing"])
    if kind == "value" and tensor.is_floating_point():
        tensor[rng.randrange(len(tensor))] = rng.choice(_WRONG_VALUES)
    elif kind == "value":
        tensor[rng.randrange(len(tensor))] = rng.choice(_WRONG)
    elif kind == "shorter":
        tensor = tensor[: rng.randrange(len(tensor))].clone()
    elif kind == "longer":
        tensor = torch.cat([tensor, tensor[:1]])
    elif kind == "type":
        tensor = tensor.double() if tensor.is_floating_point() else tensor.long()
    if kind == "missing":
        del tensors[name]
    else:
        tensors[name] = tensor
    save_map(path, tensors, 1.0)


def swap_tensors(path: Path, rng: random.Random) -> None:
    """Two tensors that changed places, or two values of one, with the old digest."""
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
    tensors = load_file(path)
    one, other = rng.sample(sorted(tensors), 2)
    if rng.random() < 0.5:
        tensors[one], tensors[other] = tensors[other], tensors[one]
    else:
        tensors[one] = tensors[one].flip(0).contiguous()
    save_file(tensors, path, metadata)


def forge_alignment(path: Path, rng: random.Random) -> None:
    """A valid digest of tensors that are not finite or do not fit."""
    folder = path.parent
    values = json.loads((folder / "alignment.json").read_text())
    tensors = load_file(folder / "alignment.safetensors")
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = rng.choice(["nan", "rows", "columns", "type", "flat", "ids"])
    if kind == "nan":
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(_WRONG_VALUES[:2])
    elif kind == "rows":
        tensor = tensor[:-1].clone()
    elif kind == "columns":
        tensor = tensor[:, :-1].clone()
    elif kind == "type":
        tensor = tensor.double()
    elif kind == "flat":
        tensor = tensor.flatten()
    else:
        values[rng.choice(["calibrator_ids", "target_ids"])][0] = rng.choice(_WRONG)
    save_file({**tensors, name: tensor}, folder / "alignment.safetensors")
    del values["sha256"]
    values["sha256"] = store._digest(values, (folder / "alignment.safetensors").read_bytes())
    (folder / "alignment.json").write_text(json.dumps(values))


class Maps:
    """Cached vocabulary maps."""

    damages = (*ANY, of_others, forge_map, swap_tensors)

    def __init__(self, world: World, folder: Path) -> None:
        self._calibrator = Calibrator.from_pretrained(world.calibrator)
        _, self._tokenizer = load_target(world.target)
        self._table = TokenTable.from_tokenizer(self._tokenizer)
        self._folder = folder / "maps"
        self._built = self._build()
        (self._file,) = self._folder.iterdir()
        self._whole = self._file.read_bytes()

    def case(self, damage: Callable[[Path, random.Random], None], rng: random.Random) -> str:
        """Damages the file and builds the map: ``"rebuilt"`` or ``"harmless"``."""
        self._folder.chmod(0o700)
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._file.write_bytes(self._whole)
        self._file.chmod(0o600)
        damage(self._file, rng)
        changed = not self._file.is_file() or self._file.read_bytes() != self._whole
        found = self._build()
        tensors, wanted = found._static, self._built._static
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
        assert found.coverage == self._built.coverage
        assert torch.equal(self._project(found), self._project(self._built))
        assert self._build().from_cache or not self._file.is_file(), "it was not written again"
        return "rebuilt" if not found.from_cache else "harmless" if changed else "unchanged"

    def _build(self) -> VocabularyMap:
        return VocabularyMap.build(
            self._calibrator, self._table, self._tokenizer, cache_dir=self._folder,
            minimum_coverage=0.0,
        )  # fmt: skip

    def _project(self, found: VocabularyMap) -> Tensor:
        width = self._calibrator.vocabulary_size
        probs = torch.full((2, 2, width), 1 / width)
        covers = [Cover(0, 0, b""), Cover(0, 1, b"th"), Cover(1, 1, b"")]
        weights = torch.ones(2, len(covers))
        return torch.stack(
            [found.project(probs, covers, weights, 2, mode=m) for m in ("prefix", "transfer")]
        )


class Alignments:
    """Saved alignments."""

    damages = (*ANY, forge_alignment, swap_tensors)

    def __init__(self, world: World, folder: Path) -> None:
        self._calibrator = Calibrator.from_pretrained(world.calibrator)
        self._target = load_target(world.target)
        made = align(self._calibrator, *self._target, show_progress=False)
        self._folder = store.save_alignment(made, self._calibrator, folder / "alignment")
        self._whole = {path: path.read_bytes() for path in self._folder.iterdir()}
        self._made = self._digest(store.load_alignment(self._folder))

    def case(self, damage: Callable[[Path, random.Random], None], rng: random.Random) -> str:
        """Damages a file and loads the alignment: ``"refused"`` or ``"harmless"``."""
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        for path, data in self._whole.items():
            path.write_bytes(data)
        names = [
            path for path in self._whole if damage is not swap_tensors or path.suffix[1] == "s"
        ]
        damage(rng.choice(sorted(names)), rng)
        try:
            found = store.load_alignment(self._folder)
            found.check_target(*self._target)
            found.check_calibrator(self._calibrator)
        except AlignmentError:
            return "refused"
        assert self._digest(found) == self._made
        return "harmless"

    def _digest(self, found: Alignment) -> str:
        digest = hashlib.sha256()
        for tensor in (found.matrix, found.calibrator_rows, found.target_rows):
            digest.update(tensor.numpy().tobytes())
        facts = (found.config, found.report, found.fingerprint, found.vocabularies)
        digest.update(repr((*facts, found.calibrator_ids, found.target_ids)).encode())
        return digest.hexdigest()


def in_child(cases: Callable[[], list[tuple[str, str]]], folder: Path) -> list[tuple[str, str]]:
    """Runs cases in a child; a crash is a case, too."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            answer.write_text(json.dumps(cases()))
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code or not answer.exists():
        return [("crash", f"the child ended with {code}")]
    return [(one, other) for one, other in json.loads(answer.read_text())]


def main() -> int:
    """Runs the audit; returns 1 if there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=RESULTS / "damaged_caches.json")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="caches-"))
    world = make_world(folder / "world")
    record: dict[str, Any] = {"seed": args.seed, "cases": args.cases, "kinds": {}}
    problems: list[str] = []
    for kind, share in ((Maps, 0.6), (Alignments, 0.4)):
        place = folder / kind.__name__
        place.mkdir()
        audited, counts = kind(world, place), Counter[str]()
        rng, number, total = random.Random(args.seed), 0, round(share * args.cases)
        while number < total:
            size = min(_CHILD, total - number)
            jobs = [
                (kind.damages[(number + n) % len(kind.damages)], rng.getrandbits(64))
                for n in range(size)
            ]

            def cases(audited: Any = audited, jobs: Any = jobs) -> list[tuple[str, str]]:
                found = []
                for damage, seed in jobs:
                    try:
                        found.append((damage.__name__, audited.case(damage, random.Random(seed))))
                    except Exception as error:  # noqa: BLE001 - each is a problem
                        found.append((damage.__name__, f"problem: {error!r}"))
                return found

            for damage, result in in_child(cases, place):
                if damage == "crash" or result.startswith("problem"):
                    problems.append(f"{kind.__name__} {damage}: {result}")
                else:
                    counts[f"{damage}: {result}"] += 1
            number += size
        record["kinds"][kind.__name__] = dict(sorted(counts.items()))
    record["problems"] = problems
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, json.dumps(record, indent=1).encode() + b"\n")
    print(json.dumps(record, indent=1))
    shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
