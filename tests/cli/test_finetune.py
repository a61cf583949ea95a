"""``fusion-detox finetune`` for users: output, messages, exit codes and Ctrl-C."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("peft")

from fusion_detox.cli import app, main
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.finetuning.config import FinetuneConfig

BUILT = runpy.run_path(str(Path(__file__).parents[1] / "finetune_data.py"))
OPTIONS = [
    *("--context-length=40", "--held-out=0.2", "--device=cpu", "--learning-rate=5e-3"),
    *("--save-every=2", "--offline"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_llama: Any, byte_tokenizer: Any) -> Path:
    """Write the folder ``model`` and the file ``pairs.jsonl``."""
    path = tmp_path_factory.mktemp("cli")
    model = make_llama(len(byte_tokenizer), initializer_range=0.1)
    BUILT["save_model"](model, byte_tokenizer, path / "model")
    BUILT["write_rows"](path / "pairs.jsonl", BUILT["paraphrase_rows"](30))
    return path


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    pairs = f"--pairs={folder / 'pairs.jsonl'}"
    return ["finetune", str(folder / "model"), str(output), pairs, *OPTIONS, *more]


def test_result_on_stdout_and_messages_on_stderr(
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "adapter"
    options = ("--steps=2", "--objective=signed-margin", "--margin=0.5", "--lm-weight=none")
    assert main(arguments(folder, output, *options)) == 0
    out, err = capfd.readouterr()
    assert out.strip() == str(output)
    assert "auc_within: " in err
    assert "warning" not in err
    record = json.loads((output / "training.json").read_text())
    assert record["contrast"] == {**ContrastiveConfig().to_dict(), "margin": 0.5}
    wanted = FinetuneConfig(
        objective="signed-margin", steps=2, context_length=40, held_out=0.2, device="cpu",
        learning_rate=5e-3, save_every=2,
    )  # fmt: skip
    assert record["settings"] == wanted.to_dict()
    # The second time, it is finished; with other settings, the folder exists.
    assert main(arguments(folder, output, *options)) == 0
    out, err = capfd.readouterr()
    assert out.strip() == str(output)
    assert f"{output} is already finished; --overwrite trains it again" in caplog.text
    assert main(arguments(folder, output, *options, "--seed=9")) == 1
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith(f"error: {output} already exists")
    assert main(arguments(folder, output, *options, "--overwrite", "--json")) == 0
    found = json.loads(capfd.readouterr().out)
    assert found == {"adapter": str(output), **record["held_out"]}


def test_dpo(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    assert main(arguments(folder, tmp_path / "a", "--steps=2", "--objective=dpo", "--json")) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["after"]["auc_within"] is not None
    assert "warning" not in err


def test_the_papers_settings_are_the_defaults() -> None:
    config, contrast = FinetuneConfig(), ContrastiveConfig()
    assert config.objective == "contrastive-perplexity"
    assert (config.learning_rate, config.epochs) == (2.2e-5, 1.0)
    assert (config.micro_batch_size, config.batch_size) == (2, 2 * 3)
    assert (contrast.temperature, contrast.negative_weight) == (0.1, 1.0)
    assert (contrast.positives, contrast.negatives, contrast.perplexity) == (5, 5, "exp")
    assert contrast.anchor_weights("contrastive-perplexity") == (0.0, 0.0)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--objective=ppo"], 2, "'ppo' is not one of"),
        (["--temperature=0"], 1, "temperature must be a number of at least 0.0001, but is 0.0"),
        (["--rank=0"], 1, "rank must be a number of at least 1, but is 0"),
        (["--kl-weight=much"], 2, "'much' is neither a valid float nor 'none'"),
        (["--target-modules=nope"], 1, "no linear module named nope"),
        (["--four-bit"], 1, "four-bit"),
    ],
)
def test_wrong_options(
    more: list[str],
    code: int,
    message: str,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(arguments(folder, tmp_path / "a", *more)) == code
    out, err = capfd.readouterr()
    assert not out
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_pairs_are_required(folder: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["finetune", str(folder / "model"), str(tmp_path / "a")])
    assert found.exit_code == 2
    assert "give at least one file of paraphrase sets" in found.stderr


def test_ctrl_c_keeps_unfinished_work(folder: Path, tmp_path: Path) -> None:
    slow = arguments(folder, tmp_path / "a", "--steps=4000")
    process = subprocess.Popen(
        [sys.executable, "-m", "fusion_detox", *slow], stderr=subprocess.PIPE, text=True
    )
    steps, until = tmp_path / "a.training" / "steps", time.monotonic() + 120
    while not (steps / "checkpoint-2").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "Interrupted." in said
    assert list(steps.glob("checkpoint-*/trainer_state.json"))
    assert json.loads((steps / "curve.json").read_text())[0]["step"] == 0
    assert not (tmp_path / "a").exists()
