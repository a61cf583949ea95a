"""Models and tokenizers in other formats: the message says what a file is and what to do."""

import json
import os
import shutil

import pytest
from tokenizers import Tokenizer

from fusion_detox.errors import ConfigError, ModelError, ModelNotFoundError
from fusion_detox.files import hub
from fusion_detox.files.cache_root import cache_root
from fusion_detox.files.models import download, load_model, load_target, load_tokenizer
from fusion_detox.files.tables import hub_rows
from fusion_detox.processor import FusionLogitsProcessor

GGUF = b"GGUF\x03\x00\x00\x00" + bytes(16)
LOAD = r"from_pretrained\('.*', gguf_file='model.gguf'\).*FusionLogitsProcessor.*config\.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", GGUF, "model.gguf is a GGUF file, the format of llama.cpp.*" + LOAD),
        ("renamed.bin", GGUF, "is a GGUF file"),
        ("model.onnx", b"\x08\x07", "is an ONNX file.*download the model that the file was made"),
        ("model.safetensors", b"", "weights without their configuration; give its folder"),
        ("model.pt", b"PK", "is a pickle, which can run code.*is never read"),
        ("notes.txt", b"hello", "notes.txt is a file; give the folder that holds the"),
        ("empty", b"", "empty is a file"),
    ],
)
def test_a_file_as_model(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for load in (load_model, load_target):
        with pytest.raises(ModelNotFoundError, match=message):
            load(path)


@pytest.mark.parametrize(
    ("name", "message"), [("model.gguf", "GGUF.*" + LOAD), ("onnx/model.onnx", "ONNX")]
)
@pytest.mark.parametrize("configured", [False, True])
def test_a_folder_with_only_another_format(tmp_path, name, message, configured):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(GGUF)
    if name.endswith("onnx"):
        (tmp_path / name).write_bytes(b"\x08\x07")
    if configured:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for load in (load_target, load_tokenizer, load_model):
        with pytest.raises(ModelError, match=rf"holds no model that can be loaded: .*{message}"):
            load(tmp_path)


def test_a_calibrator_is_no_target(calibrator_folder):
    with pytest.raises(ModelError, match=r"is a calibrator.*name the calibrator with --calibrator"):
        load_model(calibrator_folder)


def test_a_gguf_beside_a_model_is_ignored(target_folder, tmp_path):
    folder = shutil.copytree(target_folder, tmp_path / "both")
    (folder / "model.gguf").write_bytes(GGUF)
    load_target(folder)


def test_a_folder_without_a_tokenizer(target_folder, tmp_path):
    folder = shutil.copytree(target_folder, tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer.*Copy tokenizer\.json"):
        load_target(folder)
    load_model(folder)


def test_a_tokenizer_by_its_path(calibrator, target_folder):
    wanted = FusionLogitsProcessor(calibrator, load_tokenizer(target_folder), verify="off")
    for path in (target_folder, str(target_folder)):
        found = FusionLogitsProcessor(calibrator, path, verify="off")
        assert found.vocabulary.mapped.tolist() == wanted.vocabulary.mapped.tolist()
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json is a file; give the folder"):
        FusionLogitsProcessor(calibrator, target_folder / "tokenizer.json")
    backend = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    for wrong in (backend, None, 7):
        with pytest.raises(ConfigError, match=f"not {type(wrong).__name__}.*tokenizer_object="):
            FusionLogitsProcessor(calibrator, wrong)


@pytest.fixture
def no_network(monkeypatch):
    """A hub that cannot be reached; count how often it is asked."""
    asked = []

    def session():
        asked.append(1)
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "get_session", session)
    monkeypatch.setattr(hub, "_asked", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def test_without_a_network_a_hub_id_is_asked_for_once(no_network):
    message = "neither a folder nor in the cache, and the hub does not answer"
    for load in (load_target, load_tokenizer, load_model, lambda name: download(name, ["a"])):
        with pytest.raises(ModelNotFoundError, match=message):
            load("nobody/nothing")
    assert len(no_network) == 1
    pytest.importorskip("datasets")
    with pytest.raises(OSError, match=r"the hub does not answer.*HF_HUB_OFFLINE=1"):
        list(hub_rows("nobody/nothing", "train"))
    assert len(no_network) == 1


def test_a_hub_that_was_silent_is_asked_again_after_a_minute(no_network, monkeypatch):
    assert not hub.hub_answers()
    monkeypatch.setattr(hub, "_ask", lambda: True)
    assert not hub.hub_answers()
    monkeypatch.setattr(hub, "_asked", (hub._asked[0] - 61, False))
    assert hub.hub_answers()


def test_folders_and_the_offline_mode_ask_nobody(no_network, monkeypatch, target_folder):
    load_target(target_folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE or local_files_only forbids"):
        load_target("nobody/nothing")
    assert no_network == []


@pytest.mark.parametrize(
    ("named", "xdg", "expected"),
    [
        ("", "", "HOME/.cache/fusion-detox"),
        ("", "/some/cache", "/some/cache/fusion-detox"),
        ("", "relative", "HOME/.cache/fusion-detox"),
        ("~/here", "/some/cache", "HOME/here"),
        ("/there", "", "/there"),
    ],
)
def test_the_cache_folder(monkeypatch, named, xdg, expected):
    monkeypatch.setenv("FUSION_DETOX_CACHE", named)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert str(cache_root()) == expected.replace("HOME", os.path.expanduser("~"))
