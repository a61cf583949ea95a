"""Shipped models, found from a checkout and from an installed package."""

import pytest

from fusion_detox.calibrator import lookup
from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.errors import ModelNotFoundError


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(lookup, "_PACKAGE", tmp_path / "fusion_detox")
    return tmp_path


def put(folder, file="calibrator.json"):
    folder.mkdir(parents=True)
    (folder / file).write_text("{}")
    return folder


def test_names_from_checkout_and_package(checkout):
    in_checkout = put(checkout / "calibration_ckpts" / "english-16k")
    in_package = put(checkout / "fusion_detox" / "_shipped" / "calibrators" / "german-8k")
    (checkout / "calibration_ckpts" / "unfinished").mkdir()
    (checkout / "calibration_ckpts" / "train_english.py").touch()
    assert lookup.shipped_names() == ["english-16k", "german-8k"]
    assert lookup.find_shipped("english-16k") == in_checkout
    assert lookup.find_shipped("german-8k") == in_package


def test_an_installed_package_uses_its_own_copy(checkout):
    put(checkout / "calibration_ckpts" / "english-16k")
    own = put(checkout / "fusion_detox" / "_shipped" / "calibrators" / "english-16k")
    assert lookup.find_shipped("english-16k") == own


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "unknown", "a/b"])
def test_names_that_do_not_ship(checkout, name):
    put(checkout / "x")
    assert lookup.find_shipped(name) is None


def test_shipped_name_loads(checkout, calibrator_folder, tmp_path, monkeypatch):
    (checkout / "calibration_ckpts").mkdir()
    calibrator_folder.rename(checkout / "calibration_ckpts" / "little")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    calibrator = Calibrator.from_pretrained("little")
    assert calibrator.name == "little"
    # The user's own folder comes first.
    mine = put(elsewhere / "little")
    assert lookup.find_calibrator("little").resolve() == mine


def test_demo_target(checkout):
    with pytest.raises(ModelNotFoundError, match=r"demo target is missing.*recipes.demo_target"):
        lookup.demo_target_path()
    in_checkout = put(checkout / "examples" / "demo_target" / "model", "config.json")
    assert lookup.demo_target_path() == in_checkout
    in_package = put(checkout / "fusion_detox" / "_shipped" / "demo_target", "config.json")
    assert lookup.demo_target_path() == in_package


@pytest.mark.parametrize("name", lookup.shipped_names())
def test_every_shipped_calibrator_loads(name):
    folder = lookup.find_shipped(name)
    calibrator = Calibrator.from_pretrained(name)
    assert calibrator.reference is not None
    assert calibrator.record["command"]
    assert calibrator.record["data"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40e6
