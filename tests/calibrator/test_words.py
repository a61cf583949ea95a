"""A calibrator's listed words: saved with it, and checked wherever they come from."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from fusion_detox import Calibrator
from fusion_detox.calibrator.folder import write_config
from fusion_detox.calibrator.words import read_words
from fusion_detox.errors import CalibratorError

WRONG = [
    ({"Idiot": 1.0}, "'Idiot'"),
    ({"two words": 1.0}, "'two words'"),
    ({"f*ck": 1.0}, r"'f\*ck'"),
    ({"": 1.0}, "''"),
    ({"idiot": 0.0}, "above 0, but is 0.0"),
    ({"idiot": -2}, "above 0, but is -2"),
    ({"idiot": "6"}, "number above 0"),
    ({"idiot": float("nan")}, "number above 0"),
    ({"idiot": True}, "number above 0"),
    ({"idiot": 1e9}, "overflow"),
]


def test_words_are_saved_with_the_calibrator(calibrator: Calibrator, tmp_path: Path) -> None:
    listed = copy.copy(calibrator)
    listed.words = {"idiot": 3.5, "scheiße": 2.0}
    listed.save_pretrained(tmp_path / "listed")
    assert Calibrator.from_pretrained(tmp_path / "listed").words == listed.words
    assert "words held back in any text | 2" in (tmp_path / "listed" / "README.md").read_text()
    calibrator.save_pretrained(tmp_path / "none")
    assert "words" not in json.loads((tmp_path / "none" / "calibrator.json").read_text())
    assert Calibrator.from_pretrained(tmp_path / "none").words == {}


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_wrong_word_is_named(words: dict[str, float], message: str) -> None:
    with pytest.raises(CalibratorError, match=message):
        read_words(words)


@pytest.mark.parametrize("words", [["idiot"], {"Idiot": 1.0}, {"idiot": None}])
def test_a_file_with_wrong_words_names_the_file(
    calibrator: Calibrator, tmp_path: Path, words: object
) -> None:
    calibrator.save_pretrained(tmp_path / "made")
    path = tmp_path / "made" / "calibrator.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "words": words}))
    with pytest.raises(CalibratorError, match=r"calibrator\.json"):
        Calibrator.from_pretrained(tmp_path / "made")


def test_words_are_stored_without_touching_the_weights(
    calibrator: Calibrator, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    calibrator.save_pretrained(folder)
    weights = (folder / "clean" / "model.safetensors").read_bytes()
    write_config(folder, calibrator.config, {"idiot": 2.0})
    assert (folder / "clean" / "model.safetensors").read_bytes() == weights
    assert Calibrator.from_pretrained(folder).words == {"idiot": 2.0}
    write_config(folder, calibrator.config)
    assert Calibrator.from_pretrained(folder).words == {"idiot": 2.0}
    with pytest.raises(CalibratorError, match="'no word'"):
        write_config(folder, calibrator.config, {"no word": 2.0})
    write_config(folder, calibrator.config, {})
    assert Calibrator.from_pretrained(folder).words == {}
