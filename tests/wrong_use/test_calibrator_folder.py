"""Damaged calibrator folders, wrong names and failed writes raise clear errors."""

import errno
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, T5Config

from fusion_detox.calibrator import lookup as calibrator_lookup
from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.folder import write_config
from fusion_detox.config import FusionConfig
from fusion_detox.errors import (
    CalibratorError,
    CalibratorNotFoundError,
    ConfigError,
    DataFileError,
    ModelError,
)
from fusion_detox.files import atomic, hub


def edit(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values, indent=2))


def drop(path, name):
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values, indent=2))


def tensors(folder, change):
    path = folder / "model.safetensors"
    content = load_file(path)
    change(content)
    save_file(content, path, metadata={"format": "pt"})


def to_bert(folder):
    config = BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    shutil.rmtree(folder / "clean")
    BertForMaskedLM(config).save_pretrained(folder / "clean")


def to_t5(folder):
    T5Config(vocab_size=400, d_model=16, d_ff=16, num_layers=1).save_pretrained(folder / "clean")


def to_pickle(folder):
    (folder / "clean" / "model.safetensors").unlink()
    (folder / "clean" / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def shard(folder, name):
    weights = folder / "clean" / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), name)}
    weights.unlink()
    (folder / "clean" / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def break_line_three(path):
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace(",", "")
    path.write_text("\n".join(lines))


def remote_code(folder):
    edit(folder / "clean" / "config.json", model_type="mine", auto_map={"AutoConfig": "x.Mine"})


CLEAN, MAIN = "clean/config.json", "calibrator.json"
GATE = "model.layers.0.mlp.gate_proj.weight"
# name: (how to damage the folder, parts of the message: which file, the reason, the remedy)
DAMAGES = {
    "no calibrator.json": (
        lambda f: (f / MAIN).unlink(),
        ["has no calibrator.json", "Give the folder"],
    ),
    "broken JSON": (
        lambda f: break_line_three(f / MAIN),
        [f"{MAIN}, line 4", "not valid JSON", "correct that line"],
    ),
    "empty JSON file": (lambda f: (f / MAIN).write_text(""), [f"{MAIN}, line 1", "not valid JSON"]),
    "not UTF-8": (lambda f: (f / MAIN).write_bytes(b'{"a": "\xff"}'), [MAIN, "UTF-8", "again"]),
    "an array": (lambda f: (f / MAIN).write_text("[]"), [MAIN, "JSON object, not list"]),
    "newer format": (
        lambda f: edit(f / MAIN, format_version=3),
        [MAIN, "format_version is 3", "Install the version of fusion-detox that wrote it"],
    ),
    "no format": (
        lambda f: drop(f / MAIN, "format_version"),
        [MAIN, "format_version must be 1", "None"],
    ),
    "missing setting": (
        lambda f: drop(f / MAIN, "context_length"),
        [MAIN, "missing context_length", "unknown nothing"],
    ),
    "unknown setting": (lambda f: edit(f / MAIN, contxt=3), [MAIN, "unknown contxt"]),
    "setting of another type": (
        lambda f: edit(f / MAIN, context_length="32"),
        [MAIN, "context_length must be a JSON integer", "'32'"],
    ),
    "other distributions": (
        lambda f: edit(f / MAIN, distributions=["toxic"]),
        [MAIN, "distributions must be", "['toxic']"],
    ),
    "context too long": (
        lambda f: edit(f / MAIN, context_length=65),
        ["context_length", "at most 64", "65"],
    ),
    "strength out of range": (
        lambda f: edit(f / MAIN, fusion={"strength": -1}),
        [MAIN, "strength must be a number of at least 0", "-1", "Correct it in this file"],
    ),
    "integer that tensors cannot hold": (
        lambda f: edit(f / MAIN, fusion={"kl_budget": 10**30}),
        [MAIN, "kl_budget must be below 2**31", "1000000"],
    ),
    "unknown fusion setting": (
        lambda f: edit(f / MAIN, fusion={"alpha": 1}),
        [MAIN, "unknown fusion settings: alpha", "the known ones are rule"],
    ),
    "broken training record": (
        lambda f: (f / "training.json").write_text("{"),
        ["training.json, line 1", "not valid JSON"],
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        ["tokenizer.json is missing", "whole folder again"],
    ),
    "damaged tokenizer": (
        lambda f: edit(f / "tokenizer.json", model={"type": "BPE"}),
        ["tokenizer.json holds no tokenizer", "again"],
    ),
    "broken tokenizer configuration": (
        lambda f: truncate(f / "tokenizer_config.json", 20),
        ["tokenizer_config.json, line", "not valid JSON"],
    ),
    "other vocabulary size": (
        lambda f: edit(f / MAIN, vocabulary_size=399),
        ["vocabulary_size is 399", "have 400", "mixed"],
    ),
    "truncated weights": (
        lambda f: truncate(f / "clean" / "model.safetensors", 30_000),
        ["clean/model.safetensors (30000 bytes)", "truncated", "again"],
    ),
    "empty weights": (
        lambda f: truncate(f / "reference" / "model.safetensors", 0),
        ["reference/model.safetensors (0 bytes)", "truncated"],
    ),
    "missing tensor": (
        lambda f: tensors(f / "clean", lambda t: t.pop(GATE)),
        ["clean: the weights lack the tensor", GATE],
    ),
    "unknown tensor": (
        lambda f: tensors(f / "clean", lambda t: t.update(extra=torch.ones(2))),
        ["clean: the weights hold the tensor extra", "does not have", "again"],
    ),
    "tensor of another shape": (
        lambda f: tensors(f / "clean", lambda t: t.update({GATE: torch.ones(63, 32)})),
        [GATE, "[63, 32]", "[64, 32]", "do not belong together"],
    ),
    "edited layers": (
        lambda f: edit(f / CLEAN, num_hidden_layers=3),
        ["clean: the weights lack the tensors", "and 6 more"],
    ),
    "edited width": (
        lambda f: edit(f / CLEAN, intermediate_size=80),
        ["config.json implies", "edited"],
    ),
    "impossible width": (
        lambda f: edit(f / CLEAN, hidden_size=-1),
        [CLEAN, "hidden_size must be a whole number from 1", "-1", "correct it"],
    ),
    "not a number": (
        lambda f: tensors(f / "clean", lambda t: t[GATE].fill_(float("nan"))),
        ["clean: the tensor", GATE, "not finite", "diverged"],
    ),
    "no reference": (
        lambda f: shutil.rmtree(f / "reference"),
        ["reference/config.json is missing", "again"],
    ),
    "no weights": (
        lambda f: (f / "clean" / "model.safetensors").unlink(),
        ["clean/model.safetensors is missing", "again"],
    ),
    "no model configuration": (lambda f: (f / CLEAN).unlink(), [f"{CLEAN} is missing"]),
    "unknown kind of model": (
        lambda f: edit(f / CLEAN, model_type="llama99"),
        [CLEAN, "no model can be built", "llama99", "upgrade"],
    ),
    "code of its own": (remote_code, [CLEAN, "no model can be built"]),
    "an encoder": (to_bert, ["clean is an encoder (bert)", "causal language model such as"]),
    "an encoder-decoder": (to_t5, ["clean is an encoder-decoder model (t5)"]),
    "pickled weights": (
        to_pickle,
        ["pytorch_model.bin but no model.safetensors", "can run code", "save_pretrained"],
    ),
    "missing shard": (
        lambda f: shard(f, "model-00001-of-00002.safetensors"),
        ["index.json names model-00001-of-00002.safetensors, which is missing"],
    ),
    "shard elsewhere": (lambda f: shard(f, "../../x.safetensors"), ["points outside its folder"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder(calibrator_folder, damage):
    apply, expected = DAMAGES[damage]
    apply(calibrator_folder)
    with pytest.raises(CalibratorError, match=re.escape(str(calibrator_folder))):
        Calibrator.from_pretrained(calibrator_folder)
    with pytest.raises(CalibratorError) as raised:
        Calibrator.from_pretrained(calibrator_folder, verify=False)
    message = str(raised.value)
    assert str(calibrator_folder) in message
    for part in expected:
        assert part in message


def test_tokenizer_of_another_calibrator(calibrator_folder, tmp_path):
    path = calibrator_folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    # Swap two letters: same size, same tokens, different ids.
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(values))
    with pytest.raises(CalibratorError, match=r"the tokens in tokenizer\.json do not match"):
        Calibrator.from_pretrained(calibrator_folder, verify=False)


def test_tokenizer_larger_than_the_models(calibrator, other_tokenizer):
    with pytest.raises(
        CalibratorError, match=r"441 ids, but the models have only 400 logits.*other"
    ):
        Calibrator(calibrator.clean, calibrator.reference, other_tokenizer)


# Names


def test_missing_path(tmp_path):
    with pytest.raises(CalibratorNotFoundError, match=r"no folder .*nowhere.*Check the path"):
        Calibrator.from_pretrained(tmp_path / "nowhere")


def test_missing_path_under_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CalibratorNotFoundError) as raised:
        Calibrator.from_pretrained("~/nowhere")
    assert str(tmp_path / "nowhere") in str(raised.value)


def test_a_file(calibrator_folder):
    with pytest.raises(
        CalibratorNotFoundError, match=r"calibrator.json is a file. Give the calibrator's folder"
    ):
        Calibrator.from_pretrained(calibrator_folder / "calibrator.json")


def test_an_empty_folder(tmp_path):
    with pytest.raises(CalibratorError, match=r"no calibrator.json. Give the folder"):
        Calibrator.from_pretrained(tmp_path)


def test_a_plain_model(calibrator_folder):
    with pytest.raises(CalibratorError, match="a model to detoxify is not a calibrator"):
        Calibrator.from_pretrained(calibrator_folder / "clean")


@pytest.mark.parametrize("name", ["englich-16k", "English16k"])
def test_misspelt_shipped_name(monkeypatch, name):
    monkeypatch.setattr(calibrator_lookup, "shipped_names", lambda: ["english-16k", "german-8k"])
    with pytest.raises(CalibratorNotFoundError) as raised:
        Calibrator.from_pretrained(name)
    message = str(raised.value)
    assert f"There is no calibrator {name!r}" in message
    assert "shipped: english-16k, german-8k" in message
    assert "Did you mean 'english-16k'?" in message


def test_name_that_resembles_nothing(monkeypatch):
    monkeypatch.setattr(calibrator_lookup, "shipped_names", lambda: ["english-16k"])
    with pytest.raises(CalibratorNotFoundError, match="'organisation/name'") as raised:
        Calibrator.from_pretrained("zzz")
    assert "Did you mean" not in str(raised.value)


def test_hub_id_while_offline():
    # conftest.py sets HF_HUB_OFFLINE, and its socket guard fails any attempt to connect.
    with pytest.raises(CalibratorNotFoundError) as raised:
        Calibrator.from_pretrained("someone/calibrator")
    message = str(raised.value)
    assert "'someone/calibrator'" in message
    assert "HF_HUB_OFFLINE" in message
    assert "hf download someone/calibrator" in message


class NoRepositoryError(RepositoryNotFoundError):
    """The hub's error without the response that it normally wraps."""

    def __init__(self):
        pass

    def __str__(self):
        return "404 Client Error"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (LocalEntryNotFoundError("no connection"), "the hub does not answer"),
        (ConnectionError("no route"), "Check the spelling and the network"),
        (TimeoutError("timed out"), "the hub does not answer"),
        (NoRepositoryError(), "no hub repository 'a/b'. Check the spelling; for a private one"),
    ],
)
def test_a_hub_that_does_not_answer(monkeypatch, failure, expected):
    def snapshot_download(*args, **kwargs):
        raise failure

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    with pytest.raises(CalibratorNotFoundError) as raised:
        Calibrator.from_pretrained("a/b")
    assert expected in str(raised.value)


def test_hub_repository_without_a_calibrator(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(
        CalibratorError, match=r"repository a/b is not a calibrator.*Shipped calibrators"
    ):
        Calibrator.from_pretrained("a/b")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", 3.5])
def test_device_that_does_not_exist(calibrator_folder, device):
    with pytest.raises(ConfigError, match=r"cannot be used here.*This machine has: cpu"):
        Calibrator.from_pretrained(calibrator_folder, device=device)


@pytest.mark.parametrize("dtype", ["int8", "f32", 32])
def test_dtype_that_does_not_exist(calibrator_folder, dtype):
    with pytest.raises(ConfigError, match="dtype must be float32, bfloat16"):
        Calibrator.from_pretrained(calibrator_folder, dtype=dtype)


# Construction


def test_models_of_different_vocabularies(byte_tokenizer, make_llama):
    with pytest.raises(
        CalibratorError, match=r"400 logits and the reference 410.*share a vocabulary"
    ):
        Calibrator(make_llama(400), make_llama(410), byte_tokenizer)


def test_models_on_different_devices(calibrator, byte_tokenizer, make_llama):
    elsewhere = make_llama(400).to("meta")
    with pytest.raises(CalibratorError, match=r"clean model is on cpu.*meta.*\.to\(device\)"):
        Calibrator(calibrator.clean, elsewhere, byte_tokenizer)


def test_encoder_as_clean_model(byte_tokenizer):
    bert = BertForMaskedLM(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"The clean model is an encoder \(bert\)"):
        Calibrator(bert, None, byte_tokenizer)


def test_tokenizer_that_cannot_begin_a_text(calibrator, byte_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(CalibratorError, match=r"neither a BOS nor an EOS.*Set tokenizer.bos_token"):
        Calibrator(calibrator.clean, None, bare)


@pytest.mark.parametrize("length", [1, 65, "32", 32.0])
def test_context_out_of_range(calibrator, byte_tokenizer, length):
    with pytest.raises(CalibratorError, match="at least 2 and at most 64, the number of positions"):
        Calibrator(calibrator.clean, None, byte_tokenizer, context_length=length)


def test_contrast_without_reference(calibrator, byte_tokenizer):
    with pytest.raises(ConfigError, match=r"needs a reference model.*rule='product'"):
        Calibrator(calibrator.clean, None, byte_tokenizer, config=FusionConfig())
    alone = Calibrator(calibrator.clean, None, byte_tokenizer)
    with pytest.raises(ConfigError, match="needs a reference model"):
        alone.with_config(FusionConfig(rule="contrast"))


# Writing


def test_saving_over_other_files(calibrator, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(
        CalibratorError, match=r"exists and is not a calibrator.*new or empty folder"
    ):
        calibrator.save_pretrained(tmp_path)
    with pytest.raises(CalibratorError, match="exists and is not a calibrator"):
        calibrator.save_pretrained(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_saving_below_a_file(calibrator, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataFileError, match=r"cannot be written: .*file is not a folder"):
        calibrator.save_pretrained(tmp_path / "file" / "calibrator")


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("target", ["new", "tiny"])
@pytest.mark.parametrize(
    "failure",
    [FULL, SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["OSError", "SafetensorError"],
)
def test_full_disk(calibrator, calibrator_folder, monkeypatch, failure, target):
    def fail(*args, **kwargs):
        raise failure

    directory = calibrator_folder.with_name(target)
    before = sorted(calibrator_folder.parent.rglob("*"))
    monkeypatch.setattr(type(calibrator.reference), "save_pretrained", fail)
    with pytest.raises(DataFileError) as raised:
        calibrator.save_pretrained(directory)
    message = str(raised.value)
    assert str(directory) in message
    assert "No space left on device" in message
    assert "free some space" in message
    assert sorted(calibrator_folder.parent.rglob("*")) == before
    Calibrator.from_pretrained(calibrator_folder)


def test_full_disk_while_writing_the_tokenizer(calibrator, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")  # as raised by tokenizers

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(DataFileError, match="No space left on device"):
        calibrator.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_full_disk_while_storing_settings(calibrator_folder, monkeypatch):
    def fail(self, *args, **kwargs):
        raise FULL

    before = {path: path.read_bytes() for path in calibrator_folder.iterdir() if path.is_file()}
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DataFileError, match="No space left on device"):
        write_config(calibrator_folder, FusionConfig(strength=2.0))
    after = {path: path.read_bytes() for path in calibrator_folder.iterdir() if path.is_file()}
    assert after == before


def test_interrupted_saving(calibrator, calibrator_folder, monkeypatch):
    import os

    before = sorted(calibrator_folder.parent.rglob("*"))
    rename, calls = os.rename, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:  # the old folder has been moved away, the new one is not yet in place
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)  # as on other systems
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrator.save_pretrained(calibrator_folder)
    assert sorted(calibrator_folder.parent.rglob("*")) == before
    Calibrator.from_pretrained(calibrator_folder)


def test_record_that_is_not_json(calibrator, tmp_path):
    calibrator.record = {"when": object()}
    with pytest.raises(CalibratorError, match=r"training.json cannot be written.*only JSON values"):
        calibrator.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_storing_settings_in_an_empty_folder(tmp_path):
    with pytest.raises(CalibratorError, match=r"no calibrator.json"):
        write_config(tmp_path, FusionConfig())


def test_upload_refused(calibrator, monkeypatch):
    class Refusing:
        def __init__(self, token=None):
            pass

        def create_repo(self, *args, **kwargs):
            raise NoRepositoryError

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    with pytest.raises(CalibratorError, match=r"not uploaded to 'a/b': 404.*hf auth login"):
        calibrator.push_to_hub("a/b")


def test_upload_while_offline(calibrator):
    with pytest.raises(CalibratorError, match="not uploaded to 'a/b'"):
        calibrator.push_to_hub("a/b")
