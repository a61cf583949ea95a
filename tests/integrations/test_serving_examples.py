"""The examples of examples/serving run with a tiny model, where their engine is installed."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

from tests.gguf_files import write_gguf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "serving"
ENGINES = {
    "with_continuous_batching.py": "transformers.generation.continuous_batching",
    "with_llama_cpp.py": "llama_cpp",
    "with_mlx_lm.py": "mlx_lm",
    "with_onnx_genai.py": "onnxruntime_genai",
}


@pytest.fixture
def model(request, tmp_path, byte_tokenizer, make_llama):
    """A folder, and for llama.cpp a GGUF file."""
    target = make_llama(len(byte_tokenizer), seed=5, hidden_size=64)
    if request.param == "with_llama_cpp.py":
        write_gguf(tmp_path / "model.gguf", target, byte_tokenizer)
        return tmp_path / "model.gguf"
    target.save_pretrained(tmp_path / "target")
    byte_tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.filterwarnings("ignore:.*device_mesh:UserWarning")
@pytest.mark.parametrize(
    ("script", "model"), [(name, name) for name in ENGINES], indirect=["model"], ids=ENGINES
)
def test_example_runs(script, model, calibrator_folder, tmp_path, monkeypatch, capfd):
    if importlib.util.find_spec(ENGINES[script]) is None:
        pytest.skip(f"{ENGINES[script]} is not installed")
    options = {"--model": model, "--calibrator": calibrator_folder, "--tokens": 6}
    arguments = [str(word) for pair in options.items() for word in pair]
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--prompt", "You are a complete"])
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "maps"))
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    printed = capfd.readouterr().out
    assert printed.count("without fusion: You are a complete") == 1
    assert printed.count("\nwith fusion: You are a complete") == 1


def test_every_example_is_tested():
    own = {path.name for path in EXAMPLES.glob("with_*.py")}
    assert own == {*ENGINES, "with_vllm.py"}  # that one needs a server: `make serve-demo`
