"""Adapter folders as models: the same numbers as by peft, and clear errors."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

import peft
from transformers import AutoModelForCausalLM

from fusion_detox.errors import MissingExtraError, ModelError, ModelNotFoundError
from fusion_detox.files.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_adapter
from fusion_detox.files.fingerprints import model_fingerprint
from fusion_detox.files.models import load_model, load_target, load_tokenizer

BUILT = runpy.run_path(str(Path(__file__).parents[1] / "finetune_data.py"))
# peft 0.21 reads this property under its transformers 4 name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_llama: Any, byte_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    found: Path = BUILT["save_model"](make_llama(len(byte_tokenizer)), byte_tokenizer, folder)
    return found


@pytest.fixture(scope="module")
def made(base: Path) -> Path:
    """An adapter with random weights, made by peft alone; it has no tokenizer."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    folder = base.parent / "adapter"
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_equal_those_of_peft(base: Path, made: Path, dtype: str) -> None:
    model, tokenizer = load_target(made, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    ids = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = plain(input_ids=ids).logits
        expected = peft.PeftModel.from_pretrained(plain, made)(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert (expected - alone).abs().max() > 0.1
    assert type(model) is type(load_model(base))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.ndim)
    # The base model's tokenizer, since the adapter has none.
    assert tokenizer("You idiot.") == load_tokenizer(base)("You idiot.")


def test_an_adapter_and_its_base_have_different_fingerprints(base: Path, made: Path) -> None:
    assert model_fingerprint(load_model(base)) != model_fingerprint(load_model(made))


def test_a_model_is_not_an_adapter(base: Path) -> None:
    assert find_adapter(base) is None
    assert find_adapter("gpt2") is None
    assert find_adapter("packaged:smollm2") is None


def damaged(path: Path, change: Any) -> None:
    tensors = load_file(path)
    save_file(change(tensors), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / ADAPTER_CONFIG).write_text("{"), "adapter_config.json cannot be read"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("[" * 99999), "cannot be read"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("[]"), "the peft_type is None, but only LORA"),
        (lambda f: edit(f, peft_type="PREFIX_TUNING"), "the peft_type is 'PREFIX_TUNING'"),
        (lambda f: edit(f, megatron_config={}), "adapters of Megatron models are not loaded"),
        (lambda f: edit(f, base_model_name_or_path=None), "base_model_name_or_path is None"),
        (lambda f: edit(f, base_model_name_or_path="\x1b[2J"), r"is '\\x1b\[2J', so the model"),
        (lambda f: edit(f, base_model_name_or_path=str(f)), "is an adapter, but the adapter"),
        (lambda f: edit(f, target_modules=["w_proj"]), "does not fit its base model .*w_proj"),
        (lambda f: edit(f, r=8), "does not fit its base model .*size mismatch"),
        (lambda f: edit(f, target_modules=["q_proj"]), "has no place for the tensors"),
        (lambda f: edit(f, target_modules=["q_proj", "down_proj", "k_proj"]), "lacks the tensors"),
        (lambda f: (f / ADAPTER_WEIGHTS).write_bytes(b"x" * 9), "the adapter cannot be loaded"),
        (lambda f: (f / ADAPTER_WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
        (
            lambda f: (f / ADAPTER_WEIGHTS).rename(f / "adapter_model.bin"),
            "adapter_model.bin but no .*can run code",
        ),
        (
            lambda f: damaged(
                f / ADAPTER_WEIGHTS, lambda all: {n: t * float("inf") for n, t in all.items()}
            ),
            "values that are not finite",
        ),
    ],
)
def test_damaged_adapters(adapter: Path, damage: Any, message: str) -> None:
    damage(adapter)
    with pytest.raises(ModelError, match=message):
        load_target(adapter)


def test_the_base_model_is_missing(adapter: Path, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    edit(adapter, base_model_name_or_path=gone)
    for load in (load_target, load_tokenizer, load_model):
        with pytest.raises(ModelNotFoundError) as found:
            load(adapter)
        assert str(found.value).startswith(f"{adapter} is an adapter of {gone!r}, which cannot be")
        assert f"base_model_name_or_path in {adapter / ADAPTER_CONFIG}" in str(found.value)


def test_a_base_model_of_another_size(adapter: Path, make_llama: Any, byte_tokenizer: Any) -> None:
    other = adapter.parent / "other"
    larger = make_llama(len(byte_tokenizer), hidden_size=48, num_hidden_layers=1)
    BUILT["save_model"](larger, byte_tokenizer, other)
    edit(adapter, base_model_name_or_path=str(other))
    with pytest.raises(ModelError, match=r"does not fit its base model '.*other'"):
        load_target(adapter)


def test_peft_is_not_installed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"'peft'.*\[finetune\]"):
        load_target(made)


def test_code_in_the_base_models_folder_does_not_run(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    trap = Path(shutil.copytree(base, tmp_path / "trap"))
    settings = json.loads((trap / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "trap.Trap", "AutoConfig": "trap.Trap"}
    (trap / "config.json").write_text(json.dumps(settings))
    (trap / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nTrap = None\n")
    edit(adapter, base_model_name_or_path=str(trap))
    load_target(adapter)
    assert not (tmp_path / "ran").exists()
