"""Training end to end on toy text: output, resuming, several processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from fusion_detox import Calibrator
from fusion_detox.errors import DataError, FusionDetoxError, TrainingError
from fusion_detox.training import TrainingConfig, train_calibrator

SMALL: dict[str, Any] = {
    "base_steps": 12,
    "fork_steps": 10,
    "batch_size": 4,
    "context_length": 16,
    "vocabulary_size": 320,
    "hidden_size": 16,
    "intermediate_size": 32,
    "layers": 1,
    "heads": 2,
    "evaluate_every": 10,
    "save_every": 5,
    "warmup_steps": 2,
    "held_out": 0.1,
    "device": "cpu",
    "save_dtype": "float32",
}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 6))) for _ in range(99)]
    file = tmp_path_factory.mktemp("corpus") / "posts.jsonl"
    rows = (
        {"text": " ".join(rng.choice(words[: 60 + i % 40]) for _ in range(20)), "toxic": i % 3 == 0}
        for i in range(150)
    )
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "toy"
    train_calibrator(
        output,
        general=[corpus],
        clean_where=["toxic=false"],
        config=TrainingConfig(**SMALL),
        show_progress=False,
    )
    return output


def command(output: Path, corpus: Path, *more: str) -> list[str]:
    return [
        "-m", "fusion_detox", "train-calibrator", str(output), f"--general={corpus}",
        "--clean-where=toxic=false", *OPTIONS, *more,
    ]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    calibrator = Calibrator.from_pretrained(folder)
    assert calibrator.reference is not None
    return {
        f"{name} {key}": value
        for name, model in (("clean", calibrator.clean), ("reference", calibrator.reference))
        for key, value in model.state_dict().items()
    }


def assert_same_weights(left: Path, right: Path, tolerance: float) -> None:
    one, other = weights(left), weights(right)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=tolerance, rtol=0, msg=name)


def losses(folder: Path) -> dict[str, list[float]]:
    curves = json.loads((folder / "training.json").read_text())["curves"]
    return {stage: [e["loss"] for e in curve if "loss" in e] for stage, curve in curves.items()}


def record_of(folder: Path) -> dict[str, Any]:
    """The training record, without the command and the time that it took."""
    record: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return {k: v for k, v in record.items() if k not in ("command", "seconds")}


def test_several_gpus_in_one_process_are_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``Trainer`` would run ``DataParallel`` with one batch per GPU."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(TrainingError, match=r"sees 2 GPUs.*torchrun --nproc-per-node 2"):
        train_calibrator(
            tmp_path / "toy",
            general=[corpus],
            clean_where=["toxic=false"],
            config=TrainingConfig(**SMALL),
            show_progress=False,
        )


def test_result_loads_with_its_record(trained: Path, corpus: Path) -> None:
    calibrator = Calibrator.from_pretrained(trained)
    assert calibrator.context_length == 16
    assert calibrator.vocabulary_size == 320
    record = json.loads((trained / "training.json").read_text())
    assert record["data_files"]["general"][0]["name"] == corpus.name
    assert len(record["data_files"]["general"][0]["sha256"]) == 64
    assert record["name"] == trained.name
    assert record["seed"] == TrainingConfig().seed
    assert set(record["curves"]) == {"base", "reference", "clean"}
    for held_out in ("general", "clean"):
        for model in ("clean", "reference"):
            assert 0.5 < record["bits_per_byte"][held_out][model] < 8
    assert not trained.with_name("toy.training").exists()
    found = weights(trained)
    moved = [n for n in found if n.startswith("clean ") and "weight" in n]
    assert any((found[n] != found[n.replace("clean ", "reference ", 1)]).any() for n in moved)


def test_killed_runs_resume_and_end_the_same(trained: Path, corpus: Path, tmp_path: Path) -> None:
    """Two runs are killed at a checkpoint; the third gives the weights of an uninterrupted run."""
    output = tmp_path / "toy"
    work = tmp_path / "toy.training"
    for wanted in ("base/checkpoint-5", "reference/checkpoint-5"):
        process = subprocess.Popen([sys.executable, *command(output, corpus)])
        until = time.monotonic() + 120
        while not (work / wanted).exists() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert not output.exists()
    subprocess.run([sys.executable, *command(output, corpus)], check=True)
    assert_same_weights(output, trained, 1e-6)
    assert record_of(output) == record_of(trained)


def test_ctrl_c_keeps_completed_work(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "toy"
    slow = command(output, corpus, "--base-steps=4000")
    process = subprocess.Popen([sys.executable, *slow], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (tmp_path / "toy.training/base/checkpoint-5").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert list((tmp_path / "toy.training/base").glob("checkpoint-*/trainer_state.json"))


def test_two_processes_train_like_one_process(trained: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "toy"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29533"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *launcher, *command(output, corpus)], check=True, env=environment
    )
    one, two = losses(trained), losses(output)
    assert one.keys() == two.keys()
    for stage in one:
        assert two[stage] == pytest.approx(one[stage], rel=2e-3)
    assert json.loads((output / "training.json").read_text())["processes"] == 2


def test_from_a_base_model_and_from_a_given_tokenizer(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(**{**SMALL, "fork_steps": 2})
    base = tmp_path / "base"
    whole = Calibrator.from_pretrained(trained)
    whole.clean.save_pretrained(base)
    whole.tokenizer.save_pretrained(base)
    made = train_calibrator(
        tmp_path / "a", base=base, clean=[corpus], config=config, show_progress=False
    )
    assert made.reference is not None
    for name, value in whole.clean.state_dict().items():
        torch.testing.assert_close(made.reference.state_dict()[name], value)
    same_words = train_calibrator(
        tmp_path / "b",
        general=[corpus],
        clean_where=["toxic=false"],
        tokenizer=base,
        config=config.__class__(**{**SMALL, "base_steps": 2, "fork_steps": 2}),
        show_progress=False,
    )
    assert same_words.tokens == whole.tokens


def test_wrong_requests(trained: Path, corpus: Path, tmp_path: Path) -> None:
    def fails(kind: type[FusionDetoxError], message: str, **arguments: Any) -> None:
        output = arguments.pop("output", tmp_path / "new")
        config = TrainingConfig(**{**SMALL, **arguments.pop("settings", {})})
        with pytest.raises(kind, match=message):
            train_calibrator(output, config=config, show_progress=False, **arguments)

    both: dict[str, Any] = {"general": [corpus], "clean_where": ["toxic=false"]}
    fails(TrainingError, "there is no clean text", general=[corpus])
    fails(TrainingError, "general text is needed", clean=[corpus])
    fails(TrainingError, "already exists", output=trained, settings={"seed": 1}, **both)
    fails(TrainingError, "already exists", output=corpus.parent, **both)
    fails(DataError, "all 150 general documents are clean", general=[corpus], clean=[corpus])
    fails(DataError, "has no column 'label'", general=[corpus], clean_where=["label=x"])
    fails(
        TrainingError, "yields only .* tokens, but vocabulary_size is 5000",
        settings={"vocabulary_size": 5000}, **both,
    )  # fmt: skip
    fails(TrainingError, "holds unfinished training with other text", **both)
