"""A calibration model from the first layers of a larger one: same numbers, further training."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fusion_detox import Calibrator
from fusion_detox.cli import main
from fusion_detox.errors import ModelError, ModelNotFoundError, TrainingError
from fusion_detox.training import TrainingConfig, train_calibrator
from fusion_detox.training.truncation import truncate

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "family_models.py"))
# Where each configuration has its number of layers, and each model its layers.
CUT = {
    "GPT-2": ({"n_layer": 4}, "transformer.h"),
    "GPT-Neo": (
        {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
        "transformer.h",
    ),
    "GPT-NeoX, Pythia": ({"num_hidden_layers": 4}, "gpt_neox.layers"),
    "OPT": ({"num_hidden_layers": 4}, "model.decoder.layers"),
    "BLOOM": ({"n_layer": 4}, "transformer.h"),
    "Llama 3": ({"num_hidden_layers": 4}, "model.layers"),
    "Qwen3": ({"num_hidden_layers": 4}, "model.layers"),
    "Gemma 3": (
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "model.layers",
    ),
    "GPT-OSS": (
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "model.layers",
    ),
    "MPT": ({"n_layers": 4}, "transformer.blocks"),
    "Phi-1, Phi-2": ({"num_hidden_layers": 4}, "model.layers"),
    "Cohere Command R": ({"num_hidden_layers": 4}, "model.layers"),
}
IDS = torch.arange(4, 24)[None]


def make(name: str) -> PreTrainedModel:
    family = FAMILIES["FAMILIES"][name]
    tokenizer = FAMILIES["tokenizer_in_kind"](family.tokenizer)
    model: PreTrainedModel = family.make(len(tokenizer), tokenizer, **CUT[name][0])
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("layers", [1, 3, 4])
@pytest.mark.parametrize("name", CUT)
def test_results_equal_those_with_the_later_layers_removed(
    name: str, layers: int, tmp_path: Path
) -> None:
    large = make(name)
    before = copy.deepcopy(large.state_dict())
    small = truncate(large, layers)
    wanted = copy.deepcopy(large)
    parent, _, place = CUT[name][1].rpartition(".")
    owner: Any = wanted.get_submodule(parent)
    setattr(owner, place, getattr(owner, place)[:layers])
    torch.testing.assert_close(logits(small), logits(wanted))
    assert (layers == 4) == torch.equal(logits(small), logits(large))
    assert all(torch.equal(value, before[key]) for key, value in large.state_dict().items())
    shared = {p.data_ptr() for p in large.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared
    # Its configuration can be read again.
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(again), logits(small))
    assert again.config.get_text_config().num_hidden_layers == layers


def test_more_layers_than_the_model_has() -> None:
    with pytest.raises(
        TrainingError, match=r"at least 1 and at most 4, the number of layers of .* but is 5"
    ):
        truncate(make("GPT-2"), 5)
    with pytest.raises(TrainingError, match="but is 0"):
        truncate(make("GPT-2"), 0)


def test_a_layout_that_cannot_be_cut() -> None:
    model = make("Llama 3")
    broken = copy.deepcopy(model)
    del broken.model.norm.weight  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"cannot be cut to 2 layers: it lacks .*model.norm"):
        truncate(broken, 2)


SMALL: dict[str, Any] = {
    "fork_steps": 6,
    "batch_size": 4,
    "context_length": 16,
    "evaluate_every": 10,
    "save_every": 5,
    "warmup_steps": 2,
    "held_out": 0.1,
    "device": "cpu",
    "save_dtype": "float32",
}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    make_gpt2: Any,
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    folder = tmp_path_factory.mktemp("base") / "gpt2"
    make_gpt2(len(byte_tokenizer), seed=3, n_layer=5).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    sentences = [
        {"prompt": f"What is {i} and {i + 1}?", "completion": f"It is {2 * i + 1}, my friend."}
        for i in range(80)
    ]
    file.write_text("\n".join(map(json.dumps, sentences)))
    return file


def test_trained_on_pairs_from_the_command_line(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only clean rows: three layers by default, and the truncated base is the reference."""
    output = tmp_path / "mine"
    columns = ["--prompt-column", "prompt", "--completion-column", "completion"]
    common = [str(output), "--init-from", str(base), "--clean", str(rows), *columns, *OPTIONS]
    assert main(["train-calibrator", *common]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    calibrator = Calibrator.from_pretrained(output)
    assert calibrator.record["kept_layers"] == 3
    assert calibrator.record["base_model"] == str(base)
    start = truncate(AutoModelForCausalLM.from_pretrained(base), 3)
    assert calibrator.reference is not None
    torch.testing.assert_close(logits(calibrator.reference), logits(start))
    assert float((logits(calibrator.clean) - logits(start)).abs().max()) > 1e-3
    (text,) = calibrator.record["bits_per_byte"].values()
    assert text["clean"] < text["reference"]
    assert calibrator.clean.config.n_layer == 3


def test_resumes_only_with_the_same_layers(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run with three layers does not resume as one with two."""
    from fusion_detox.training.run import Run

    output, config = tmp_path / "mine", TrainingConfig(**SMALL)
    options: dict[str, Any] = {"clean": [rows], "config": config, "show_progress": False}
    from fusion_detox.training import Columns

    options["columns"] = Columns(prompt="prompt", completion="completion")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "stage", stop)
        with pytest.raises(KeyboardInterrupt):
            train_calibrator(output, init_from=base, **options)
    with pytest.raises(TrainingError, match="unfinished training with other text or settings"):
        train_calibrator(output, init_from=base, keep_layers=2, **options)
    with pytest.raises(TrainingError, match="unfinished training with other text or settings"):
        train_calibrator(output, base=base, **options)
    train_calibrator(output, init_from=base, keep_layers=3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init-from", "{base}", "--keep-layers", "6"], "at most 5, the number of layers of"),
        (["--init-from", "{base}", "--base", "{base}"], "exclude each other"),
        (["--keep-layers", "2"], "no model is given to take layers from"),
        (["--init-from", "{bert}"], "is an encoder (bert), which reads text in both directions"),
        (["--init-from", "{pickled}"], "holds no *.safetensors file. Only safetensors are read"),
        (["--init-from", "nowhere/at all"], "there is no such folder"),
        (["--init-from", "{base}", "--tokenizer", "x"], "a base model has its own tokenizer"),
    ],
)
def test_wrong_use(
    options: list[str],
    message: str,
    base: Path,
    rows: Path,
    tmp_path: Path,
    byte_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"base": base, "bert": tmp_path / "bert", "pickled": tmp_path / "pickled"}
    settings = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(byte_tokenizer), intermediate_size=16, **settings)
    BertForMaskedLM(config).save_pretrained(places["bert"])
    byte_tokenizer.save_pretrained(places["bert"])
    shutil.copytree(base, places["pickled"])
    (places["pickled"] / "model.safetensors").rename(places["pickled"] / "pytorch_model.bin")
    capsys.readouterr()
    output = tmp_path / "mine"
    given = [option.format(**places) for option in options]
    command = ["train-calibrator", str(output), "--clean", str(rows), "--text-column", "completion"]
    assert main([*command, *given, *OPTIONS]) == 1
    found = " ".join(capsys.readouterr().err.split())
    assert message in found
    assert not output.exists()
    if "pickled" not in str(options):  # the weights are read after the work folder was created
        assert not output.with_name("mine.training").exists()


def test_the_python_function_refuses_likewise(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        train_calibrator(tmp_path / "x", clean=[rows], init_from=tmp_path / "nowhere")
    with pytest.raises(TrainingError, match="but is -1"):
        train_calibrator(tmp_path / "x", clean=[rows], init_from=base, keep_layers=-1)
    assert not list(tmp_path.iterdir())
