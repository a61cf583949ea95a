"""Digests: every change to a file that decides the numbers is noticed, unless it is accepted."""

import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion_detox.calibrator import folder as calibrator_folder_module
from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.digests import file_digests
from fusion_detox.calibrator.folder import DISTRIBUTIONS, read_settings, write_config, write_digests
from fusion_detox.calibrator.lookup import find_shipped, shipped_names
from fusion_detox.config import FusionConfig
from fusion_detox.errors import CalibratorError

FILES = [
    "calibrator.json",
    "clean/config.json",
    "clean/generation_config.json",
    "clean/model.safetensors",
    "reference/config.json",
    "reference/generation_config.json",
    "reference/model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
WEIGHTS = "clean/model.safetensors"


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def to_format_1(folder):
    values = json.loads((folder / "calibrator.json").read_text())
    del values["digests"]
    (folder / "calibrator.json").write_text(json.dumps({**values, "format_version": 1}))


def test_what_is_sealed(calibrator_folder):
    written = {p.relative_to(calibrator_folder) for p in calibrator_folder.rglob("*.*")}
    free = {Path("README.md"), Path("training.json")}
    assert written == {Path(file) for file in FILES} | free
    assert {*read_settings(calibrator_folder).digests} == set(FILES[1:])


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(calibrator_folder, name):
    path, rng = calibrator_folder / name, random.Random(name)
    content = path.read_bytes()
    for _ in range(20):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        if name == "calibrator.json":
            try:  # between values, white space may change
                if json.loads(damaged) == json.loads(content):
                    continue
            except ValueError:
                pass
        with pytest.raises(CalibratorError, match=name):
            Calibrator.from_pretrained(calibrator_folder)
    path.write_bytes(content)
    Calibrator.from_pretrained(calibrator_folder)


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_models_that_changed_places(calibrator_folder, name):
    one, other = calibrator_folder / "clean" / name, calibrator_folder / "reference" / name
    one.rename(calibrator_folder / "aside")
    other.rename(one)
    (calibrator_folder / "aside").rename(other)
    with pytest.raises(CalibratorError) as raised:
        Calibrator.from_pretrained(calibrator_folder)
    assert f"{WEIGHTS} holds the content of reference/model.safetensors" in str(raised.value)


def test_a_file_of_another_calibrator(calibrator, calibrator_folder, make_llama, tmp_path):
    calibrator.clean = make_llama(400, seed=5)
    calibrator.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, calibrator_folder / WEIGHTS)
    with pytest.raises(CalibratorError, match=f"{WEIGHTS} was changed or damaged"):
        Calibrator.from_pretrained(calibrator_folder)


def test_added_and_missing_files(calibrator_folder):
    (calibrator_folder / "clean" / "._config.json").write_text("x")  # of a file manager
    (calibrator_folder / "notes.json").write_text("x")
    Calibrator.from_pretrained(calibrator_folder)
    (calibrator_folder / "added_tokens.json").write_text("{}")
    (calibrator_folder / "clean" / "generation_config.json").unlink()
    with pytest.raises(CalibratorError) as raised:
        Calibrator.from_pretrained(calibrator_folder)
    assert "clean/generation_config.json is missing; added_tokens.json was added" in str(
        raised.value
    )


def test_the_digests_cannot_be_removed(calibrator_folder):
    values = json.loads((calibrator_folder / "calibrator.json").read_text())
    for changed in (
        {name: value for name, value in values.items() if name != "digests"},
        {**values, "digests": {}},
        {**values, "digests": {**values["digests"], "files": {}}},
        {**values, "format_version": 1},
    ):
        (calibrator_folder / "calibrator.json").write_text(json.dumps(changed))
        with pytest.raises(CalibratorError, match=r"calibrator\.json"):
            Calibrator.from_pretrained(calibrator_folder)


def test_settings_edited_by_hand(calibrator_folder):
    edit(calibrator_folder / "calibrator.json", context_length=16)
    with pytest.raises(CalibratorError) as raised:
        Calibrator.from_pretrained(calibrator_folder)
    message = str(raised.value)
    assert "was edited or damaged" in message
    assert f"fusion-detox doctor {calibrator_folder} --write-digests" in message
    assert Calibrator.from_pretrained(calibrator_folder, verify=False).context_length == 16
    with pytest.raises(CalibratorError, match="was edited or damaged"):
        write_config(calibrator_folder, FusionConfig(strength=2.0))  # it would accept the edit
    write_digests(calibrator_folder)
    assert Calibrator.from_pretrained(calibrator_folder).context_length == 16


def test_format_and_order_of_the_file_do_not_matter(calibrator_folder):
    path = calibrator_folder / "calibrator.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(dict(sorted(values.items(), reverse=True)), indent=7))
    Calibrator.from_pretrained(calibrator_folder)


def test_new_settings_do_not_accept_damaged_files(calibrator_folder):
    data = bytearray((calibrator_folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (calibrator_folder / WEIGHTS).write_bytes(data)
    write_config(calibrator_folder, FusionConfig(strength=2.0))
    with pytest.raises(CalibratorError, match=WEIGHTS):
        Calibrator.from_pretrained(calibrator_folder)
    assert Calibrator.from_pretrained(calibrator_folder, verify=False).config.strength == 2.0


def test_without_digests_there_is_one_warning(calibrator_folder, caplog, monkeypatch):
    monkeypatch.setattr(calibrator_folder_module, "_warned", set())
    to_format_1(calibrator_folder)
    with caplog.at_level(logging.WARNING):
        Calibrator.from_pretrained(calibrator_folder, verify=False)
        assert not caplog.messages
        for _ in range(2):
            Calibrator.from_pretrained(calibrator_folder)
    (message,) = caplog.messages
    assert "has no digests" in message
    assert f"fusion-detox doctor {calibrator_folder} --write-digests" in message


@pytest.mark.parametrize("write", [write_digests, lambda f: write_config(f, FusionConfig())])
def test_digests_are_added_to_an_older_folder(calibrator_folder, caplog, write):
    before = (calibrator_folder / "calibrator.json").read_bytes()
    to_format_1(calibrator_folder)
    write(calibrator_folder)
    assert (calibrator_folder / "calibrator.json").read_bytes() == before
    Calibrator.from_pretrained(calibrator_folder)
    assert not caplog.messages


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_calibrators_have_digests(name):
    folder = find_shipped(name)
    assert read_settings(folder).digests == file_digests(folder, DISTRIBUTIONS)


# What digests cannot find


def zero_all(tensors):
    for tensor in tensors.values():
        tensor.zero_()


def zero_one(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()


@pytest.mark.parametrize("zero", [zero_all, zero_one])
def test_zero_weights(calibrator_folder, zero):
    tensors = load_file(calibrator_folder / WEIGHTS)
    zero(tensors)
    save_file(tensors, calibrator_folder / WEIGHTS, metadata={"format": "pt"})
    write_digests(calibrator_folder)
    with pytest.raises(CalibratorError, match=r"all values of the tensor .* are zero"):
        Calibrator.from_pretrained(calibrator_folder)


def test_zero_biases_are_fine(byte_tokenizer, make_gpt2, tmp_path):
    model = make_gpt2(400)
    assert not model.transformer.h[0].attn.c_attn.bias.any()
    Calibrator(model, None, byte_tokenizer).save_pretrained(tmp_path / "gpt2")
    assert torch.equal(
        Calibrator.from_pretrained(tmp_path / "gpt2").clean.lm_head.weight, model.lm_head.weight
    )


def replace_by_pipe(path):
    os.mkfifo(path)


def replace_by_device(path):
    path.symlink_to("/dev/zero")


@pytest.fixture
def no_blocking():
    """Fail instead of waiting for a pipe."""

    def stop(*_):
        raise TimeoutError("a named pipe or a device was opened")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("replace", [replace_by_pipe, replace_by_device])
@pytest.mark.parametrize("name", [*FILES, "training.json", "added_tokens.json", "README.md"])
def test_only_regular_files_are_opened(calibrator_folder, no_blocking, name, replace, verify):
    path = calibrator_folder / name
    path.unlink(missing_ok=True)
    replace(path)
    with pytest.raises(CalibratorError, match=rf"{name} cannot be read: it is a .*not a regular"):
        Calibrator.from_pretrained(calibrator_folder, verify=verify)


def test_links_to_files_are_followed(calibrator_folder, tmp_path):
    """The hub's cache consists of links."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(calibrator_folder.rglob("*.*"))):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    Calibrator.from_pretrained(calibrator_folder)


def test_an_adapter_in_place_of_a_model(calibrator_folder):
    path = calibrator_folder / "clean" / "adapter_config.json"
    path.write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(CalibratorError, match=r"adapter_config.json was added"):
        Calibrator.from_pretrained(calibrator_folder)
    with pytest.raises(CalibratorError, match="cannot be an adapter"):
        Calibrator.from_pretrained(calibrator_folder, verify=False)
