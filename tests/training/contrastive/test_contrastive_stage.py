"""The contrastive stage of ``train_calibrator``: after language modelling, alone, or resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fusion_detox import Calibrator
from fusion_detox.errors import DataError, TrainingError
from fusion_detox.training import TrainingConfig, train_calibrator
from fusion_detox.training.contrastive.config import ContrastiveConfig

KIND = ["the friend is kind today", "she is a gentle person", "they help their old neighbours"]
HARSH = ["the friend is an idiot today", "she is a horrid person", "they hate their old neighbours"]
SMALL = {
    "base_steps": 20,
    "fork_steps": 6,
    "batch_size": 4,
    "context_length": 16,
    "vocabulary_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layers": 2,
    "heads": 2,
    "anchors": 2,
    "objective_steps": 30,
    "objective_learning_rate": 3e-3,
    "evaluate_every": 15,
    "device": "cpu",
    "save_dtype": "float32",
    "held_out": 0.2,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    general, clean, pairs = (folder / name for name in ("general.txt", "clean.txt", "pairs.jsonl"))
    endings = [f"and number {n} is here" for n in range(40)]
    kind = [f"{one} {end}" for one in KIND for end in endings]
    harsh = [f"{one} {end}" for one in HARSH for end in endings]
    general.write_text("\n\n".join(kind + harsh))
    clean.write_text("\n\n".join(kind))
    rows = [
        {"anchor": good, "positives": [good], "negatives": [bad]}
        for good, bad in zip(kind, harsh, strict=True)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"general": [general], "clean": [clean], "pairs": [pairs]}


def config(**changes):
    return TrainingConfig(**{**SMALL, "objective": "likelihood-ratio", **changes})


@pytest.fixture(scope="module")
def made(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "calibrator"
    train_calibrator(
        folder, **texts, config=config(), contrast=ContrastiveConfig(tilt=4.0, kl_weight=1.0),
        show_progress=False,
    )  # fmt: skip
    return folder


def ratio(calibrator, text):
    """Summed log-likelihood ratio of the clean model to the reference."""
    ids = torch.tensor(
        [[calibrator.bos_id, *calibrator.tokenizer(text, add_special_tokens=False)["input_ids"]]]
    )
    total = 0.0
    for model, sign in ((calibrator.clean, 1), (calibrator.reference, -1)):
        with torch.no_grad():
            log_probs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        total += sign * float(log_probs.gather(1, ids[0, 1:, None]).sum())
    return total


def test_clean_model_learns_to_avoid_toxic_wordings(made):
    """Measured on endings that the model never saw."""
    calibrator = Calibrator.from_pretrained(made)
    record = calibrator.record
    for good, bad in zip(KIND, HARSH, strict=True):
        end = "and number 77 is here"
        assert ratio(calibrator, f"{good} {end}") > ratio(calibrator, f"{bad} {end}") + 1.0
    before, after = (record["held_out_sets"][when] for when in ("before", "after"))
    assert after["ratio_auc_within"] >= before["ratio_auc_within"]
    assert after["ratio_auc_within"] > 0.9
    assert record["name"] == made.name
    assert record["objective"] == "likelihood-ratio"
    assert record["paraphrase_sets"] > 60
    assert "pairs" in record["data_files"]
    assert [*record["curves"]] == ["base", "clean", "contrast", "reference"]
    assert "kl" in record["curves"]["contrast"][0]


def test_tilt_of_zero_equalises_the_ratios(texts, made, tmp_path):
    """With λ = 0 all wordings get the same target, so training undoes the difference."""
    folder = tmp_path / "flat"
    train_calibrator(
        folder, calibrator=made, clean=texts["clean"], pairs=texts["pairs"],
        config=config(objective_steps=60), contrast=ContrastiveConfig(tilt=0.0, kl_weight=0.0),
        show_progress=False,
    )  # fmt: skip
    old, new = Calibrator.from_pretrained(made), Calibrator.from_pretrained(folder)
    gaps = [
        [ratio(one, good) - ratio(one, bad) for good, bad in zip(KIND, HARSH, strict=True)]
        for one in (old, new)
    ]
    assert max(map(abs, gaps[1])) < 0.5 * min(gaps[0])
    for name, tensor in old.reference.state_dict().items():
        assert torch.equal(tensor, new.reference.state_dict()[name]), name
    assert new.tokens.fingerprint() == old.tokens.fingerprint()
    assert new.record["base_model"] == str(made)
    assert new.record["continued_from"]["curves"] == old.record["curves"]
    card = (folder / "README.md").read_text()
    assert "### Before that" in card
    assert "#### Bits per byte" in card


@pytest.mark.parametrize("objective", ["contrastive-perplexity", "signed-margin"])
def test_without_clean_text_the_reference_is_the_base(texts, tmp_path, objective):
    folder = tmp_path / "alone"
    train_calibrator(
        folder, general=texts["general"], pairs=texts["pairs"],
        config=config(objective=objective), show_progress=False,
    )  # fmt: skip
    calibrator = Calibrator.from_pretrained(folder)
    assert [*calibrator.record["curves"]] == ["base", "contrast"]
    before, after = (calibrator.record["held_out_sets"][when] for when in ("before", "after"))
    assert before["kl"] == 0
    assert after["kl"] > 0
    if objective == "signed-margin":
        assert after["ratio_auc_within"] > 0.9


def test_killed_stage_resumes_to_the_same_weights(texts, made, tmp_path):
    """SIGKILL between two checkpoints of the stage must not affect the result."""
    script = (
        "import sys, json\n"
        "from fusion_detox.training import TrainingConfig, train_calibrator\n"
        "out, old, clean, pairs, settings = sys.argv[1:]\n"
        "train_calibrator(out, calibrator=old, clean=[clean], pairs=[pairs], "
        "config=TrainingConfig(**json.loads(settings)), show_progress=False)\n"
    )
    settings = {**SMALL, "objective": "likelihood-ratio", "objective_steps": 400, "save_every": 20}

    def command(out):
        parts = (out, made, texts["clean"][0], texts["pairs"][0], json.dumps(settings))
        return [sys.executable, "-c", script, *map(str, parts)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path / "killed"), env=environment)
    stage = tmp_path / "killed.training" / "contrast"
    deadline = time.monotonic() + 120
    while not [*stage.glob("checkpoint-*/trainer_state.json")] and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "whole"):
        subprocess.run(command(tmp_path / name), env=environment, check=True)
    one, other = (Calibrator.from_pretrained(tmp_path / name) for name in ("killed", "whole"))
    for name, tensor in one.clean.state_dict().items():
        torch.testing.assert_close(tensor, other.clean.state_dict()[name], atol=1e-6, rtol=0)


def test_conflicting_arguments(texts, made, tmp_path):
    general, clean, pairs = texts["general"], texts["clean"], texts["pairs"]
    cases = [
        ({"clean": clean, "general": general}, "learns from paraphrase sets: give some with --pa"),
        (
            {"calibrator": made, "pairs": pairs, "general": general},
            "--general cannot be used with it; use --clean for text .* must not change",
        ),
        (
            {"calibrator": made, "pairs": pairs, "base": made, "tokenizer": made},
            "--base or --init-from, --tokenizer cannot be used",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(TrainingError, match=message):
            train_calibrator(tmp_path / "no", **arguments, config=config(), show_progress=False)
    plain = config(objective="language-modelling")
    with pytest.raises(TrainingError, match="objective language-modelling does not use them"):
        train_calibrator(tmp_path / "no", **texts, config=plain, show_progress=False)
    with pytest.raises(TrainingError, match="--calibrator requires a contrastive --objective"):
        train_calibrator(tmp_path / "no", calibrator=made, config=plain, show_progress=False)
    with pytest.raises(
        TrainingError, match=r"context_length 64 is more than 16, the context_length of"
    ):
        train_calibrator(
            tmp_path / "no", calibrator=made, pairs=pairs, config=config(context_length=64),
            show_progress=False,
        )  # fmt: skip
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"anchor": "a", "positives": ["a b"], "negatives": []}\n')
    with pytest.raises(DataError, match="has no negatives"):
        train_calibrator(
            tmp_path / "no", calibrator=made, pairs=[bare], config=config(), show_progress=False
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.jsonl"]
