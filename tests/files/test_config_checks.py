"""Configurations are checked before transformers reads them, and usual ones pass."""

import json
from pathlib import Path

import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.errors import CalibratorError, ModelError
from fusion_detox.files.config_checks import (
    check_model_config,
    check_tokenizer,
    check_tokenizer_config,
)

SOURCE = Path("some/config.json")
# The defaults of these have ids outside their vocabulary, of which transformers warns, too.
OWN_FAULT = {"ArceeConfig", "MusicgenConfig", "MusicgenMelodyConfig", "Starcoder2Config"}


def defaults(kind):
    try:
        return json.loads(kind().to_json_string(use_diff=False))
    except Exception:  # some need arguments or other packages
        return {}


@pytest.mark.filterwarnings("ignore")
def test_the_defaults_of_all_families_pass():
    found = {kind.__name__: defaults(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
    assert sum(map(bool, found.values())) > 100
    refused = set()
    for name, values in found.items():
        try:
            check_model_config(values, SOURCE)
        except ModelError:
            refused.add(name)
    assert refused <= OWN_FAULT


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hidden_size", 0, "hidden_size must be a whole number from 1"),
        ("num_attention_heads", 0, "num_attention_heads must be"),
        ("num_attention_heads", True, "num_attention_heads must be"),
        ("num_key_value_heads", -1, "num_key_value_heads must be"),
        ("head_dim", 0, "head_dim must be"),
        ("head_dim", 2.0, "but is 2.0"),
        ("vocab_size", 2**31, "vocab_size must be a whole number from 1 to 2147483647"),
        ("num_hidden_layers", "2", "but is '2'"),
        ("eos_token_id", 400, "eos_token_id must be a whole number from 0 to 399, but is 400"),
        ("eos_token_id", [0, 2**31], "but is 2147483648"),
        ("bos_token_id", -1, "bos_token_id must be"),
        ("bos_token_id", "0", "bos_token_id must be"),
        ("pad_token_id", -2, "pad_token_id must be a whole number from -1"),
        ("hidden_act", "exec", "hidden_act is 'exec', but must be one of"),
        ("hidden_act", 1, "hidden_act is 1"),
        ("dtype", "int8", "dtype is 'int8', but must be one of bfloat16"),
        ("torch_dtype", "pickle", "torch_dtype is 'pickle'"),
        ("attn_implementation", "kernels-community/flash-attn", "must be one of batched_mm, eager"),
        ("_attn_implementation", "a/b:c", "_attn_implementation is 'a/b:c'"),
        ("experts_implementation", "a/b", "experts_implementation is 'a/b'"),
        ("rms_norm_eps", "x", "rms_norm_eps must be a number"),
        ("attention_dropout", 2, "attention_dropout must be a number from 0 to 1"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config is not supported"),
        ("transformers_weights", "../x.safetensors", "transformers_weights is not supported"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_refused(name, value, expected, nested):
    values = {**json.loads(LlamaConfig(vocab_size=400).to_json_string(use_diff=False)), name: value}
    with pytest.raises(ModelError) as raised:
        check_model_config({"text_config": values} if nested else values, SOURCE)
    message = str(raised.value)
    assert message.startswith("some/config.json: ")
    assert expected in message
    assert "correct it" in message or "not supported" in message


def test_tokenizers():
    usual = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "c"}]}
    check_tokenizer(usual, SOURCE)
    check_tokenizer({"model": {"vocab": [["a", -1.5]]}}, SOURCE)  # Unigram
    for bad in (2**31, -1, "1", None, 1.0):
        with pytest.raises(ModelError, match="an added token must be a whole number"):
            check_tokenizer({"added_tokens": [{"id": bad}]}, SOURCE)
        with pytest.raises(ModelError, match="the id of 'a' must be"):
            check_tokenizer({"model": {"vocab": {"a": bad}}}, SOURCE)
    check_tokenizer_config({"added_tokens_decoder": {"0": {}}, "tokenizer_file": None}, SOURCE)
    for name in ("tokenizer_file", "vocab_file", "fast_tokenizer_files", "auto_map"):
        with pytest.raises(ModelError, match=f"{name} must be absent"):
            check_tokenizer_config({name: "/etc/passwd"}, SOURCE)
    for name, value in (
        ("model_max_length", "128"),
        ("model_max_length", 0),
        ("padding_side", 1),
        ("bos_token", ["x"]),
        ("add_prefix_space", "x"),
        ("model_input_names", "input_ids"),
    ):
        with pytest.raises(ModelError, match=f"{name} must be"):
            check_tokenizer_config({name: value}, SOURCE)
    check_tokenizer_config({"model_max_length": 1e30, "bos_token": {"content": "x"}}, SOURCE)
    with pytest.raises(ModelError, match="added_tokens_decoder must be"):
        check_tokenizer_config({"added_tokens_decoder": {str(2**31): {}}}, SOURCE)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 2_000_000_000}, "has the shape [400, 32], but config.json implies"),
        ({"hidden_size": 2**20}, "but config.json implies"),
        ({"intermediate_size": 2**27}, "but config.json implies"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the weights hold"),
    ],
)
def test_a_model_far_larger_than_its_weights_is_not_built(calibrator_folder, changes, expected):
    """It would need up to terabytes."""
    path = calibrator_folder / "clean" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CalibratorError) as raised:
        Calibrator.from_pretrained(calibrator_folder, verify=False)
    assert expected in str(raised.value)


def test_what_could_not_be_loaded_is_not_saved(calibrator, tmp_path):
    calibrator.clean.config.eos_token_id = 400
    with pytest.raises(CalibratorError, match=r"^clean/.*config.json: eos_token_id must be .* 399"):
        calibrator.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())
