"""``fusion-detox doctor``: its verdict, its exit codes, and what it accepts."""

import json
import re

import pytest
from safetensors.torch import load_file, save_file

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.cli import main
from fusion_detox.errors import CalibratorError

WEIGHTS = "clean/model.safetensors"


@pytest.fixture
def doctor(calibrator_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))

    def run(*options):
        code = main(["doctor", str(calibrator_folder), *map(str, options)])
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return code, found.out

    return run


def results(out):
    """The result of each check."""
    return dict(re.findall(r"^│ ([a-z ]+?) +│ (ok|problem) +│", out, re.M))


def test_healthy(doctor, calibrator_folder, target_folder):
    code, out = doctor()
    assert code == 0
    assert set(results(out).values()) == {"ok"}
    assert results(out).keys() == {"versions", "digests", "models", "effect"}
    assert out.splitlines()[-1] == f"Verdict: {calibrator_folder} is healthy."
    code, out = doctor("--target", target_folder)
    assert code == 0
    assert results(out).keys() >= {"vocabulary map", "effect on target"}
    assert out.splitlines()[-1].endswith(f"is healthy and fits {target_folder}.")


def test_a_damaged_file(doctor, calibrator_folder):
    data = bytearray((calibrator_folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (calibrator_folder / WEIGHTS).write_bytes(data)
    code, out = doctor()
    assert code == 1
    assert results(out) == {
        "versions": "ok",
        "digests": "problem",
        "models": "ok",
        "effect": "ok",
    }
    assert f"{WEIGHTS} was changed or damaged" in out
    assert out.splitlines()[-1] == f"Verdict: {calibrator_folder} has 1 problem: digests."


def test_no_digests(doctor, calibrator_folder):
    path = calibrator_folder / "calibrator.json"
    values = json.loads(path.read_text())
    del values["digests"]
    path.write_text(json.dumps({**values, "format_version": 1}))
    code, out = doctor()
    assert (code, results(out)["digests"]) == (1, "problem")
    assert "--write-digests" in out
    code, out = doctor("--write-digests")
    assert code == 0
    assert "Wrote the digests of 8 files" in out
    assert doctor()[0] == 0


def test_an_edit_is_accepted(doctor, calibrator_folder):
    path = calibrator_folder / "calibrator.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "context_length": 16}))
    with pytest.raises(CalibratorError, match="--write-digests"):
        Calibrator.from_pretrained(calibrator_folder)
    assert doctor("--write-digests")[0] == 0
    assert Calibrator.from_pretrained(calibrator_folder).context_length == 16


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "are zero"), (float("nan"), "not finite"), (3e38, "logits are not finite")],
)
def test_damage_is_not_accepted(doctor, calibrator_folder, value, expected):
    tensors = load_file(calibrator_folder / WEIGHTS)
    tensors["lm_head.weight"].fill_(value)
    save_file(tensors, calibrator_folder / WEIGHTS, metadata={"format": "pt"})
    code, out = doctor("--write-digests")
    assert code == 1
    assert results(out)["models"] == "problem"
    assert expected in out
    assert out.splitlines()[-1].endswith("has 1 problem: models. No digests were written.")
    with pytest.raises(CalibratorError, match=WEIGHTS):
        Calibrator.from_pretrained(calibrator_folder)


def test_models_that_change_nothing(doctor, calibrator, calibrator_folder):
    calibrator.reference = calibrator.clean
    calibrator.save_pretrained(calibrator_folder)
    code, out = doctor()
    assert (code, results(out)["models"]) == (1, "problem")
    assert "The clean and the reference model are equal" in out
    calibrator.reference = None
    calibrator.config = calibrator.config.replace(rule="product", strength=0)
    calibrator.save_pretrained(calibrator_folder)
    code, out = doctor()
    assert (code, results(out)["effect"]) == (1, "problem")


def test_swapped_models_with_new_digests(tmp_path, monkeypatch, capsys):
    """Probes find what digests cannot: the shipped models in the wrong places."""
    shipped = Calibrator.from_pretrained("english-16k")
    shipped.clean, shipped.reference = shipped.reference, shipped.clean
    shipped.save_pretrained(tmp_path / "swapped")
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["doctor", str(tmp_path / "swapped")]) == 1
    out = capsys.readouterr().out
    assert results(out)["effect"] == "problem"
    assert "swapped or damaged" in out


def test_wrong_use(doctor, capsys, tmp_path):
    assert doctor("--target", tmp_path / "nowhere")[0] == 1
    assert main(["doctor"]) == 2
    assert main(["doctor", "someone/calm", "--write-digests"]) == 2
    assert main(["doctor", str(tmp_path / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err
