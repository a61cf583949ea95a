"""``fusion-detox finetune`` for users: output, messages, exit codes and Ctrl-C."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("peft")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox.cli import app, main
from fusion_detox.files.fingerprints import model_fingerprint
from fusion_detox.files.models import load_model
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.finetuning.config import FinetuneConfig

# peft 0.21 reads this property under its transformers 4 name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
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


def test_an_adapter_folder_is_a_model_for_other_commands(
    folder: Path,
    tmp_path: Path,
    calibrator_folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user's way: fine-tune, look at a continuation, measure."""
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))
    adapter = tmp_path / "adapter"
    assert main(arguments(folder, adapter, "--steps=4", "--learning-rate=0.05")) == 0
    use = [f"--calibrator={calibrator_folder}", "--device=cpu", "--max-new-tokens=6"]
    capfd.readouterr()
    assert main(["generate", str(adapter), "You are", *use, "--greedy", "--base"]) == 0
    written = json.loads(capfd.readouterr().out)["base"]

    # The same by hand.
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    inputs = tokenizer("You are", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    alone = base.generate(**inputs, **options)[0]
    by_peft = PeftModel.from_pretrained(base, adapter).generate(**inputs, **options)[0]
    assert not torch.equal(alone, by_peft)
    start = inputs["input_ids"].shape[1]
    assert written == tokenizer.decode(by_peft[start:], skip_special_tokens=True)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("You are\nThe weather\n")
    small = ["--samples=2", "--scorer=lexical", "--resamples=50", "--suite=none", "--no-similarity"]
    small += ["--harmless-texts=2", "--harmless-tokens=8", "--setting=default"]
    run = tmp_path / "run"
    measure = ["evaluate", str(adapter), f"--prompts={prompts}", f"--out={run}", *use, *small]
    assert main(measure) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["target"]["name"] == "adapter"
    assert results["target"]["fingerprint"] == model_fingerprint(load_model(adapter))
    # Another adapter of the same base model is another target.
    shutil.rmtree(adapter)
    assert main(arguments(folder, adapter, "--steps=4", "--learning-rate=0.01")) == 0
    assert main(measure) == 1
    assert "target.fingerprint" in capfd.readouterr().err


def test_an_adapter_is_not_fine_tuned(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    assert main(arguments(folder, adapter, "--steps=1")) == 0
    capfd.readouterr()
    again = ["finetune", str(adapter), str(tmp_path / "b"), f"--pairs={folder / 'pairs.jsonl'}"]
    assert main([*again, *OPTIONS]) == 1
    err = capfd.readouterr().err
    assert f"error: {adapter} is an adapter, but finetune needs a whole model. Merge it" in err


def test_dpo(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    assert main(arguments(folder, tmp_path / "a", "--steps=2", "--objective=dpo", "--json")) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["after"]["auc_within"] is not None
    assert "warning" not in err


def test_the_best_measured_objective_is_the_default() -> None:
    """In the results of our comparison: the least toxic text without higher perplexity."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "contrastive_ablation.json"
    base, *rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def toxic(row: dict[str, Any]) -> float:
        return float(row["lexical"][0] + row["contextual"][0])

    affordable = [
        row
        for row in rows
        if row["perplexity"][0] is not None and row["perplexity"][0] <= base["perplexity"][0]
    ]
    best = min(affordable, key=toxic)["name"]
    assert best.replace(" ", "-") == FinetuneConfig().objective
    # The paper's objective is available by name, and was not less toxic than the model itself.
    by_name = {row["name"]: row for row in rows}
    FinetuneConfig(objective="contrastive-perplexity")
    assert toxic(by_name["J"]) > toxic(base)


def test_the_other_defaults_are_the_papers() -> None:
    config, contrast = FinetuneConfig(), ContrastiveConfig()
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
