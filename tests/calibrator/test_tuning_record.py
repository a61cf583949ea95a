"""Tuned settings and their record are written in one step, and tuning again starts where it did."""

import json
import runpy
from pathlib import Path

import pytest

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.folder import write_config
from fusion_detox.calibrator.tuning_record import settings_before_tuning, write_tuning
from fusion_detox.config import FusionConfig
from fusion_detox.errors import CalibratorError, DataFileError
from fusion_detox.files import atomic

killed_at = runpy.run_path(str(Path(__file__).parents[1] / "killed.py"))["killed_at"]
BEFORE, AFTER = FusionConfig(), FusionConfig(strength=2.5)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_settings_record_and_card_change_and_all_else_stays(calibrator_folder):
    (calibrator_folder / "alignments").mkdir()
    (calibrator_folder / "alignments" / "notes.txt").write_text("mine")
    before = content(calibrator_folder)
    write_tuning(calibrator_folder, BEFORE, AFTER, {"format": 1, "seeds": [4]})
    after = content(calibrator_folder)
    changed = {str(path) for path in after if after[path] != before.get(path)}
    assert changed == {"calibrator.json", "training.json", "README.md"}
    assert after.keys() == before.keys()
    loaded = Calibrator.from_pretrained(calibrator_folder)
    assert loaded.config == AFTER
    assert loaded.record["tuning"]["seeds"] == [4]
    assert loaded.record["seed"] == 7
    assert calibrator_folder.name in (calibrator_folder / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("in_one_step", [True, False])
def test_after_a_kill_settings_and_record_belong_together(
    calibrator_folder, monkeypatch, in_one_step
):
    if not in_one_step:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    operations, config = 1, AFTER

    def tune(config):
        write_tuning(calibrator_folder, BEFORE, config, {"format": 1})

    while killed_at(operations, lambda: tune(AFTER)):
        operations *= 2
    seen = set()
    for number in range(0, operations, max(1, operations // 24)):
        config = FusionConfig(strength=1 + number / 100)
        killed_at(number, lambda config=config: tune(config))
        atomic.recover(calibrator_folder)
        settings = json.loads((calibrator_folder / "calibrator.json").read_text())["fusion"]
        record = json.loads((calibrator_folder / "training.json").read_text())
        assert record["tuning"]["after"] == settings
        seen.add(settings["strength"] == config.strength)
        assert [path.name for path in calibrator_folder.parent.iterdir()] == ["tiny"]
    assert seen == {True, False}
    Calibrator.from_pretrained(calibrator_folder)


def test_tuning_again_starts_from_the_settings_before(calibrator_folder):
    def start():
        return settings_before_tuning(Calibrator.from_pretrained(calibrator_folder))

    before = start()
    assert before == BEFORE
    write_tuning(calibrator_folder, before, AFTER, {})
    assert start() == before
    write_tuning(calibrator_folder, start(), FusionConfig(strength=0.7), {})
    assert start() == before
    # Settings that somebody chose since then are where the next tuning starts.
    write_config(calibrator_folder, FusionConfig(strength=0.2))
    assert start() == FusionConfig(strength=0.2)
    write_tuning(calibrator_folder, start(), AFTER, {})
    record = json.loads((calibrator_folder / "training.json").read_text())
    record["tuning"]["before"] = "damaged"
    (calibrator_folder / "training.json").write_text(json.dumps(record))
    assert start() == AFTER


def test_a_folder_that_cannot_be_written_is_unchanged(calibrator_folder, monkeypatch):
    before = content(calibrator_folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_replace", full)
        with pytest.raises(DataFileError, match=r"No space left on device\. Its previous"):
            write_tuning(calibrator_folder, BEFORE, AFTER, {})
    assert content(calibrator_folder) == before
    (calibrator_folder / "training.json").write_text("{")
    with pytest.raises(CalibratorError, match=r"training\.json"):
        write_tuning(calibrator_folder, BEFORE, AFTER, {})
