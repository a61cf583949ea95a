"""Calibrators: saving and loading, construction, the hub, and loading target models."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.utils import logging

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.folder import read_settings, write_config
from fusion_detox.calibrator.lookup import find_calibrator
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, ModelError, ModelNotFoundError, VocabularyError
from fusion_detox.files import hub
from fusion_detox.files.models import load_target, load_tokenizer


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Round trip


@pytest.mark.parametrize("kind", ["make_llama", "make_gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(byte_tokenizer, tmp_path, request, kind, tied):
    make = request.getfixturevalue(kind)
    models = [make(400, seed=seed, tie_word_embeddings=tied) for seed in (1, 2)]
    config = FusionConfig(strength=1.7, clip=float("inf"), kl_budget=0.3)
    record = {"seed": 3, "note": "naïve 🙂"}
    before = Calibrator(*models, byte_tokenizer, config=config, record=record)
    before.save_pretrained(tmp_path / "first")
    after = Calibrator.from_pretrained(tmp_path / "first")
    assert torch.equal(logits(after.clean), logits(before.clean))
    assert torch.equal(logits(after.reference), logits(before.reference))
    assert not torch.equal(logits(after.clean), logits(after.reference))
    assert after.config == config
    assert after.record == record
    assert after.context_length == before.context_length == 64
    assert after.bos_id == before.bos_id == 0
    assert after.vocabulary_size == before.vocabulary_size == 400
    assert after.tokens.token_bytes == before.tokens.token_bytes
    assert after.tokens.fingerprint() == before.tokens.fingerprint()
    text = "What a stupid idiot,\n 東京 🙂"
    assert after.tokenizer(text).input_ids == byte_tokenizer(text).input_ids
    after.save_pretrained(tmp_path / "again")
    modes = {path.stat().st_mode for path in (tmp_path / "again").rglob("*") if path.is_file()}
    assert len(modes) == 1
    one, two = contents(tmp_path / "first"), contents(tmp_path / "again")
    name = Path("README.md")
    assert one.pop(name) == two.pop(name).replace(b"again", b"first")
    assert one == two


@pytest.mark.parametrize("name", ["other_tokenizer", "sentencepiece_tokenizer"])
def test_round_trip_of_other_tokenizers(make_llama, tmp_path, request, name):
    tokenizer = request.getfixturevalue(name)
    Calibrator(make_llama(len(tokenizer)), None, tokenizer).save_pretrained(tmp_path / "x")
    after = Calibrator.from_pretrained(tmp_path / "x")
    text = "You idiot, naïve 🙂\n\n  twice"
    assert after.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert after.bos_id == 1
    assert after.reference is None


def test_loaded_models_are_frozen_and_in_eval_mode(calibrator_folder):
    calibrator = Calibrator.from_pretrained(calibrator_folder)
    for model in calibrator.models.values():
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert calibrator.device == torch.device("cpu")
    assert repr(calibrator).startswith("Calibrator(")


def test_dtype_on_disk_and_in_memory(calibrator, calibrator_folder, tmp_path):
    calibrator.save_pretrained(tmp_path / "half", dtype="bfloat16")
    assert calibrator.clean.dtype == torch.float32  # the models in memory do not change
    size = (tmp_path / "half" / "clean" / "model.safetensors").stat().st_size
    full = (calibrator_folder / "clean" / "model.safetensors").stat().st_size
    assert size < 0.55 * full
    widened = Calibrator.from_pretrained(tmp_path / "half")
    assert widened.clean.dtype == torch.float32
    rounded = calibrator.clean.lm_head.weight.bfloat16().float()
    assert torch.equal(widened.clean.lm_head.weight, rounded)
    half = Calibrator.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert half.clean.dtype == half.reference.dtype == torch.bfloat16


def test_saving_replaces_the_folder_as_a_whole(calibrator, calibrator_folder):
    (calibrator_folder / ".git").mkdir()
    (calibrator_folder / ".git" / "HEAD").write_text("ref")
    (calibrator_folder / "clean" / "stale.safetensors").write_text("x")
    calibrator.with_config(FusionConfig(strength=3.0)).save_pretrained(calibrator_folder)
    assert Calibrator.from_pretrained(calibrator_folder).config.strength == 3.0
    assert not (calibrator_folder / "clean" / "stale.safetensors").exists()
    assert (calibrator_folder / ".git" / "HEAD").read_text() == "ref"  # other files are kept
    assert [path.name for path in calibrator_folder.parent.iterdir()] == [calibrator_folder.name]


def test_saving_into_an_empty_or_nested_folder(calibrator, tmp_path):
    (tmp_path / "empty").mkdir()
    calibrator.save_pretrained(tmp_path / "empty")
    calibrator.save_pretrained(str(tmp_path / "a" / "b"))
    assert contents(tmp_path / "empty").keys() == contents(tmp_path / "a" / "b").keys()


def test_home_folder(calibrator, calibrator_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(calibrator_folder.parent))
    assert find_calibrator(f"~/{calibrator_folder.name}") == calibrator_folder
    calibrator.save_pretrained("~/again")
    assert (calibrator_folder.parent / "again" / "calibrator.json").is_file()


def test_parts_load_with_transformers_alone(calibrator, calibrator_folder):
    model = AutoModelForCausalLM.from_pretrained(calibrator_folder / "clean")
    assert torch.equal(logits(model), logits(calibrator.clean))
    tokenizer = AutoTokenizer.from_pretrained(calibrator_folder)
    assert tokenizer("You idiot").input_ids == calibrator.tokenizer("You idiot").input_ids


def test_older_versions_of_transformers_can_read_the_files(calibrator_folder):
    tokenizer = json.loads((calibrator_folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    assert json.loads((calibrator_folder / "clean" / "config.json").read_text())["rope_theta"]


# Construction


def test_defaults(make_llama, byte_tokenizer):
    long = Calibrator(make_llama(400, max_position_embeddings=300), None, byte_tokenizer)
    assert long.context_length == 128
    assert long.config.rule == "product"
    both = Calibrator(make_llama(400), make_llama(400), byte_tokenizer)
    assert both.context_length == 64
    assert both.config == FusionConfig()
    assert both.record == {}


def test_a_padded_head_and_ids_without_logits(make_llama, byte_tokenizer):
    assert Calibrator(make_llama(448), None, byte_tokenizer).vocabulary_size == 400
    padded = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<pad>",  # id 400, which the model does not have
    )
    calibrator = Calibrator(make_llama(400), None, padded)
    assert calibrator.vocabulary_size == 400
    assert calibrator.bos_id == 0  # EOS, because there is no BOS


def test_with_config_shares_the_weights(calibrator):
    other = calibrator.with_config(FusionConfig(strength=0.5))
    assert other.clean is calibrator.clean
    assert other.config.strength == 0.5
    assert calibrator.config.strength == 1.0


def test_to_moves_and_returns_itself(calibrator):
    assert calibrator.to("cpu") is calibrator
    with pytest.raises(ConfigError, match="cannot be used here"):
        calibrator.to("cuda:99")


def test_write_config(calibrator_folder):
    before = contents(calibrator_folder)
    config = FusionConfig(strength=2.25, plausibility=0.01)
    write_config(calibrator_folder, config)
    after = contents(calibrator_folder)
    changed = {str(path) for path in after if after[path] != before.get(path)}
    assert changed == {"calibrator.json", "README.md"}
    assert read_settings(calibrator_folder).fusion == config
    assert b"| strength | 2.25 |" in after[Path("README.md")]
    assert Calibrator.from_pretrained(calibrator_folder).config == config
    write_config(str(calibrator_folder), FusionConfig())
    assert contents(calibrator_folder) == before


# The hub


def test_download_requests_only_calibrator_files(calibrator_folder, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(calibrator_folder)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    calibrator = Calibrator.from_pretrained(
        "someone/calm", revision="v2", token="secret", cache_dir=Path("cache")
    )
    assert calibrator.name == "someone/calm"
    assert asked["repo_id"] == "someone/calm"
    assert asked["revision"] == "v2"
    assert asked["token"] == "secret"
    assert asked["cache_dir"] == "cache"
    assert asked["local_files_only"] is False
    written = {path.as_posix() for path in contents(calibrator_folder)}
    kept = huggingface_hub.utils.filter_repo_objects(
        [*written, "model.py", "clean/pytorch_model.bin", "clean/optimizer.pt", "x.safetensors"],
        allow_patterns=asked["allow_patterns"],
    )
    assert set(kept) == written


@pytest.mark.parametrize("revision", [None, "v2"])
def test_push_to_hub(calibrator, monkeypatch, revision):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create_repo", repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_branch(self, repo_id, *, branch, exist_ok):
            calls.append(("create_branch", repo_id, branch, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
            calls.append(("upload_folder", repo_id, commit_message, revision))
            loaded = Calibrator.from_pretrained(folder_path)
            assert torch.equal(logits(loaded.clean), logits(calibrator.clean))
            assert 'from_pretrained("me/calm")' in (Path(folder_path) / "README.md").read_text()
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = calibrator.push_to_hub("calm", private=True, token="secret", revision=revision)
    assert address == "https://hub/commit/1"
    branch = [("create_branch", "me/calm", revision, True)] if revision else []
    assert calls == [
        ("token", "secret"),
        ("create_repo", "calm", True, True),
        *branch,
        ("upload_folder", "me/calm", "Upload calibrator", revision),
    ]


# Targets


@pytest.fixture
def target(tmp_path, make_gpt2, byte_tokenizer):
    folder = tmp_path / "target"
    make_gpt2(448).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def test_load_target(target, make_gpt2):
    model, tokenizer = load_target(str(target))
    assert torch.equal(logits(model), logits(make_gpt2(448)))
    assert not model.training
    assert tokenizer("idiot").input_ids
    half, _ = load_target(target, dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16
    assert next(half.parameters()).requires_grad


def test_load_target_of_the_wrong_kind(target, tmp_path):
    BertForMaskedLM(
        BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ModelError, match=r"is an encoder \(bert\), which reads text in both directions"
    ):
        load_target_model(tmp_path / "bert", target)
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"is an encoder-decoder model \(t5\)"):
        load_target_model(tmp_path / "t5", target)


def load_target_model(folder, tokenizer_of):
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return load_target(folder)


def test_bert_as_decoder_is_a_causal_model(target, tmp_path):
    from transformers import BertLMHeadModel

    config = BertConfig(
        vocab_size=400, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, is_decoder=True
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    model, _ = load_target_model(tmp_path / "bert", target)
    assert model.config.is_decoder


def test_load_incomplete_target(target, make_gpt2, tmp_path):
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"holds no \*.safetensors file. Only safetensors are read"
    ):
        load_target(target)
    (target / "pytorch_model.bin").rename(target / "model.safetensors")
    content = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(content[:5000])
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_target(target)
    (target / "model.safetensors").write_bytes(content)
    (target / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_target(target)


def test_load_target_without_its_head(target, make_gpt2):
    config = make_gpt2(448, tie_word_embeddings=False).config
    GPT2Model(config).save_pretrained(target)
    with pytest.raises(ModelError, match=r"lacks the tensor lm_head.weight.*without its language"):
        load_target(target)


def test_load_target_with_another_models_tokenizer(target, other_tokenizer, make_gpt2):
    make_gpt2(400).save_pretrained(target)
    other_tokenizer.save_pretrained(target)
    with pytest.raises(VocabularyError, match=r"tokens, but the model has only 400 logits"):
        load_target(target)


@pytest.mark.parametrize("load", [load_target, load_tokenizer])
def test_load_missing_target(tmp_path, load):
    with pytest.raises(ModelNotFoundError, match=r"No \w+ at .*nowhere: there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="does not look like a hub id"):
        load("./nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFoundError, match="is a file; give the folder"):
        load(tmp_path / "file")
    with pytest.raises(ModelNotFoundError, match=r"'someone/model'.*HF_HUB_OFFLINE.*hf download"):
        load("someone/model")


def test_loading_is_silent(calibrator, calibrator_folder, capfd):
    """Saving and loading print nothing and restore transformers' logging settings."""
    before = logging.get_verbosity()
    calibrator.save_pretrained(calibrator_folder)
    Calibrator.from_pretrained(calibrator_folder)
    assert logging.get_verbosity() == before
    assert logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")
