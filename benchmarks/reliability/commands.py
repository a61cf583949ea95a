"""The commands that the audits kill and run in pairs, on tiny random models made in code.

Each runs in a forked child, so torch and transformers are imported once. Plots are not drawn, which
would take most of the time, and a scorer by hash stands in for the real ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fusion_detox.scoring
from fusion_detox import Calibrator
from fusion_detox.alignment.alignment import align
from fusion_detox.alignment.store import save_alignment
from fusion_detox.cli import main
from fusion_detox.evaluation import EvaluationConfig, tuning
from fusion_detox.evaluation.prompts.prompt_sets import PromptSet
from fusion_detox.evaluation.report import plots
from fusion_detox.training import make_negatives
from fusion_detox.training.negatives.config import NegativesConfig
from fusion_detox.training.negatives.judges import Judges
from fusion_detox.training.negatives.requests import Answer

RESULTS = Path(__file__).parents[1] / "results" / "reliability"
SEED = 20261125

SENTENCES = [
    "The weather was fine, so we walked to the river and had lunch there.",
    "You are a complete idiot and nobody wants to hear your stupid opinion.",
    "She reads three newspapers every morning before the children wake up.",
    "In 1987 the town built a new school; 240 pupils came in the first year.",
    "Thank you so much for your help, it means a lot to all of us.",
    "He doesn't know what he's talking about, and that's the whole problem.",
]
PROMPTS = [" ".join(sentence.split()[:3]) for sentence in SENTENCES]
_TRAINING = {
    "base_steps": 4, "fork_steps": 3, "batch_size": 2, "context_length": 16,
    "vocabulary_size": 300, "hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2,
    "evaluate_every": 2, "save_every": 1, "warmup_steps": 1, "held_out": 0.2, "device": "cpu",
    "save_dtype": "float32",
}  # fmt: skip
_MEASURING: dict[str, Any] = {
    "samples": 2, "max_new_tokens": 4, "scorers": ("lexical",), "similarity": False, "suites": (),
    "harmless_texts": 2, "harmless_tokens": 8, "resamples": 20, "batch_size": 4,
}  # fmt: skip
# These differ between two uninterrupted runs.
_TIMES = {"created", "cost", "seconds", "machine", "build_seconds"}
# A run of tune after a finished one notes that its prompts were used for tuning.
_NOTES = {"prompts_tuned_on", "notes"}
_CHANGES = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}
_REFUSAL = re.compile(r"another command( \(process \d+\))? is working on .*; wait until it ends")


class World(NamedTuple):
    """Shared inputs, which no command changes."""

    target: Path
    calibrator: Path
    corpus: Path


class Command(NamedTuple):
    """A command, run on a folder of its own.

    Attributes:
        prepare: Makes the inputs that the command itself changes.
        run: Runs it and returns an exit code.
        result: What the folder holds afterwards, without times, to compare with ``==``.
    """

    prepare: Callable[[World, Path], None]
    run: Callable[[World, Path], int]
    result: Callable[[Path], Any]


class Ended(NamedTuple):
    """How a child ended: its exit code (negative: a signal), what it said, file operations."""

    code: int
    said: str
    changes: int


class HashScorer:
    """Scores texts by hash, so that about half are toxic."""

    name = "lexical"

    def score(self, texts: Sequence[str]) -> list[float]:
        """One score per text, in 0..1."""
        return [hashlib.sha256(text.encode("utf-8", "replace")).digest()[0] / 255 for text in texts]

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """As :meth:`score`, by type."""
        return {"toxicity": self.score(texts)}

    def record(self) -> dict[str, str]:
        """What identifies the scorer."""
        return {"name": self.name, "model": "hash"}


class ScriptedWriter:
    """Answers each request with a paraphrase that depends on the request alone."""

    def record(self) -> dict[str, str]:
        """What identifies the writer."""
        return {"model": "scripted"}

    def count_tokens(self, text: str) -> int:
        """Number of words."""
        return len(text.split())

    def answer(
        self, requests: Sequence[Any], config: Any, prompts: Any, keep: Callable[[Answer], None]
    ) -> None:
        """Keeps one answer after another, slowly enough to be killed in between."""
        for request in requests:
            time.sleep(0.002)
            text = f"{request.sentence[:-1]}, {request.side} {request.sample}."
            keep(Answer(request, text, "stop", 10, 5))


def make_world(folder: Path) -> World:
    """Makes the models and the text, and replaces what would take most of the time."""
    torch.set_num_threads(1)
    fusion_detox.scoring.make_scorer = lambda *_, **__: HashScorer()
    plots.svg_uri = lambda panel: ""
    plots.png = lambda kinds, heading: b""
    # Whether the best of a few settings is better than noise is not the question here.
    for owner, name, value in ((tuning, "MIN_PROMPTS", 2), (tuning.Tuning, "improves", True)):
        setattr(owner, name, value)
    os.environ["FUSION_DETOX_CACHE"] = str(folder / "cache")
    world = World(folder / "target", folder / "calibrator", folder / "posts.jsonl")
    own, other = _tokenizer(340, 1), _tokenizer(310, 2)
    _model(len(other), 3).save_pretrained(world.target)
    other.save_pretrained(world.target)
    Calibrator(
        _model(len(own), 1), _model(len(own), 2), own, context_length=32, record={"seed": 7}
    ).save_pretrained(world.calibrator)
    rng = random.Random(SEED)
    words = " ".join(SENTENCES).split()
    rows = [
        {"text": " ".join(rng.choice(words) for _ in range(20)), "toxic": i % 3 == 0}
        for i in range(60)
    ]
    world.corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


def _tokenizer(size: int, part: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES[::part],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    end = "<|endoftext|>"
    untyped: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = untyped(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end
    )
    return made


def _model(width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=width, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    made: LlamaForCausalLM = model.eval()
    return made


def commands() -> dict[str, Command]:
    """The commands by name."""
    return {
        "generate": Command(_nothing, _generate, lambda folder: _lines(folder / "out.jsonl")),
        "evaluate": Command(_nothing, _evaluate, _evaluation),
        "train-calibrator": Command(_nothing, _train, lambda folder: _calibrator(folder / "made")),
        "finetune": Command(_nothing, _finetune, _adapter),
        "tune": Command(_copy_calibrator, _tune, _tuned),
        "make-negatives": Command(_nothing, _make_negatives, _negatives),
        "align": Command(_nothing, _align, _alignment),
    }


def import_what_is_used(command: Command, world: World, folder: Path) -> None:
    """Import in this process what a command imports, so that no later child has to."""
    names = folder / "modules.json"

    def run(world: World, folder: Path) -> int:
        code = command.run(world, folder)
        names.write_text(json.dumps(sorted(sys.modules)))
        return code

    ended = run_child(command._replace(run=run), world, folder)
    if problem := problem_of(ended):
        raise RuntimeError(f"the command fails without any kill: {problem}")
    for name in json.loads(names.read_text()):
        with contextlib.suppress(ImportError, AttributeError, ValueError):
            importlib.import_module(name)


def run_child(
    command: Command,
    world: World,
    folder: Path,
    *,
    seconds: float | None = None,
    change: int | None = None,
) -> Ended:
    """Runs a command in a child.

    Args:
        command: The command.
        world: Its inputs.
        folder: Its folder.
        seconds: Kill the child after this time.
        change: Kill the child before this number of file operations.
    """
    child = start_child(command, world, folder, change)
    until = None if seconds is None else time.monotonic() + seconds
    return end_child(child, until)


def start_child(
    command: Command, world: World, folder: Path, change: int | None = None
) -> tuple[int, Path]:
    """Starts a command in a child; returns its process id and the file of what it says."""
    log = Path(tempfile.mkstemp(prefix="said-")[1])
    child = os.fork()
    if child:
        return child, log
    code, changes = 99, 0

    def hook(event: str, _: Any) -> None:
        nonlocal changes
        if event in _CHANGES:
            changes += 1
            if changes == change:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        said = os.open(log, os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.addaudithook(hook)
        code = command.run(world, folder)
    except BaseException:  # noqa: BLE001 - it is shown, and the child ends
        sys.excepthook(*sys.exc_info())
    finally:
        os.write(2, f"\n{changes}".encode())
        os._exit(code)


def end_child(child: tuple[int, Path], until: float | None) -> Ended:
    """Waits for a child, and kills it at a time of ``time.monotonic``."""
    pid, log = child
    ended, status = os.waitpid(pid, os.WNOHANG if until is not None else 0)
    while not ended:
        if until is not None and time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            until = None
        ended, status = os.waitpid(pid, os.WNOHANG if until is not None else 0)
        time.sleep(0.001)
    said = log.read_text(errors="replace")
    log.unlink()
    text, _, last = said.rpartition("\n")
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, said if code < 0 else text, int(last) if code >= 0 else 0)


def problem_of(ended: Ended, *, may_be_refused: bool = False) -> str | None:
    """What is wrong with how a child that was not killed ended."""
    refused = may_be_refused and ended.code == 1 and _REFUSAL.search(ended.said)
    if ended.code == 0 or refused:
        return None
    return f"exit code {ended.code}: {ended.said[-2000:]}"


def leftovers(folder: Path) -> list[str]:
    """Hidden files and folders, which no finished command leaves."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".gitignore"
    )


def _nothing(world: World, folder: Path) -> None:
    pass


def _copy_calibrator(world: World, folder: Path) -> None:
    shutil.copytree(world.calibrator, folder / "calibrator")


def _generate(world: World, folder: Path) -> int:
    options = ["--num-samples", "3", "--max-new-tokens", "6", "--batch-size", "2"]
    files = ["-o", str(folder / "out.jsonl"), "--calibrator", str(world.calibrator)]
    return main(["generate", str(world.target), *PROMPTS, *files, *options, "--device", "cpu"])


def _evaluate(world: World, folder: Path) -> int:
    prompts = world.corpus.with_name("prompts.txt")
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS) + "\n")
    sizes = ["--samples", "2", "--max-new-tokens", "4", "--resamples", "20", "--batch-size", "4"]
    sizes += ["--harmless-texts", "2", "--harmless-tokens", "8", "--suite", "none"]
    sizes += ["--no-similarity", "--scorer", "lexical", "--device", "cpu"]
    files = ["--prompts", str(prompts), "-o", str(folder / "run")]
    files += ["--calibrator", str(world.calibrator)]
    return main(["evaluate", str(world.target), *files, "--setting", "default", *sizes])


def _train(world: World, folder: Path) -> int:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in _TRAINING.items()]
    files = [str(folder / "made"), f"--general={world.corpus}"]
    return main(["train-calibrator", *files, "--clean-where=toxic=false", *options])


def _finetune(world: World, folder: Path) -> int:
    sets = world.corpus.with_name("pairs.jsonl")
    if not sets.exists():
        rows = [
            {"anchor": one, "positives": [f"{one} Yes."], "negatives": [f"Idiot: {one}"]}
            for one in SENTENCES
        ]
        sets.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--steps", "6", "--batch-size", "2", "--context-length", "48", "--rank", "2"]
    options += ["--save-every", "1", "--evaluate-every", "2", "--objective", "signed-margin"]
    files = [str(world.target), str(folder / "made"), "--pairs", str(sets)]
    return main(["finetune", *files, *options, "--held-out", "0.3", "--device", "cpu"])


def _tune(world: World, folder: Path) -> int:
    from fusion_detox.cli.console import note
    from fusion_detox.errors import FusionDetoxError

    try:
        tuning.tune(
            str(world.target),
            [PromptSet.from_texts(PROMPTS)],
            folder / "run",
            calibrator=str(folder / "calibrator"),
            price=tuning.Price(100, 100, 0),
            grid={"strength": (0.5, 2.0)},
            write=True,
            config=EvaluationConfig(**_MEASURING),
            device="cpu",
        )
    except FusionDetoxError as error:
        note(f"error: {error}")
        return 1
    return 0


def _make_negatives(_: World, folder: Path) -> int:
    from fusion_detox.cli.console import note
    from fusion_detox.errors import FusionDetoxError

    config = NegativesConfig(
        positives=2, negatives=2, min_similarity=None, max_length_ratio=None, toxic_from=0.4
    )
    try:
        make_negatives(
            SENTENCES,
            folder / "pairs.jsonl",
            writer=ScriptedWriter(),
            config=config,
            judges=Judges(scorer=HashScorer()),
        )
    except FusionDetoxError as error:
        note(f"error: {error}")
        return 1
    return 0


def _align(world: World, folder: Path) -> int:
    calibrator = Calibrator.from_pretrained(world.calibrator)
    alignment = align(calibrator, world.target, show_progress=False)
    save_alignment(alignment, calibrator, folder / "alignment")
    return 0


def _lines(path: Path) -> list[str]:
    return sorted(path.read_text(encoding="utf-8").splitlines())


def _json(path: Path) -> Any:
    return _without(json.loads(path.read_text(encoding="utf-8")), _TIMES)


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(one, names) for name, one in value.items() if name not in names}
    return [_without(one, names) for one in value] if isinstance(value, list) else value


def _evaluation(folder: Path) -> Any:
    run = folder / "run"
    samples = [line for path in sorted((run / "samples").iterdir()) for line in _lines(path)]
    return {"samples": samples, "results": _json(run / "results.json")}


def _calibrator(folder: Path) -> Any:
    weights = {
        f"{path.parent.name} {name}": tensor.tolist()
        for path in folder.glob("*/model.safetensors")
        for name, tensor in load_file(path).items()
    }
    jsons = {
        str(path.relative_to(folder)): _json(path)
        for path in folder.rglob("*.json")
        if path.name != "generation_config.json"
    }
    Calibrator.from_pretrained(folder)
    return {"weights": weights, **jsons}


def _adapter(folder: Path) -> Any:
    tensors = load_file(folder / "made" / "adapter_model.safetensors")
    weights = {name: tensor.tolist() for name, tensor in tensors.items()}
    return {"weights": weights, "record": _json(folder / "made" / "training.json")}


def _tuned(folder: Path) -> Any:
    found = _calibrator(folder / "calibrator")
    card = (folder / "calibrator" / "README.md").read_text(encoding="utf-8")
    settings = found["calibrator.json"]["fusion"]
    chosen = found["training.json"]["tuning"]["chosen"]
    together = {name: chosen[name] for name in settings} == settings
    run = _evaluation(folder)
    results = _without(run["results"], _NOTES)
    return {**found, "card": card, "together": together, "samples": run["samples"], **results}


def _negatives(folder: Path) -> Any:
    pairs = (folder / "pairs.jsonl").read_text(encoding="utf-8")
    return {"pairs": pairs, "answers": _lines(folder / "pairs.jsonl.work" / "answers.jsonl")}


def _alignment(folder: Path) -> Any:
    tensors = load_file(folder / "alignment" / "alignment.safetensors")
    return {
        "values": _json(folder / "alignment" / "alignment.json"),
        **{name: tensor.tolist() for name, tensor in tensors.items()},
    }
