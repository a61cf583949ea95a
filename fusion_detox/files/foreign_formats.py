"""Messages for files and folders that hold a model or tokenizer in another format."""

from __future__ import annotations

from pathlib import Path

from fusion_detox.errors import ModelError, ModelNotFoundError

_FOLDER = (
    "a folder of transformers with config.json, *.safetensors and tokenizer.json; download the "
    "model that the file was made from, or convert the file"
)
_TOKENIZERS = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt")


def not_a_folder(path: Path, what: str) -> ModelNotFoundError:
    """The error for a file where the folder of a model or tokenizer is expected."""
    kind = _kind(path)
    if kind:
        return ModelNotFoundError(f"{path} is {kind}")
    if path.suffix == ".safetensors":
        return ModelNotFoundError(
            f"{path} is a file of weights without their configuration; give its folder, with "
            "config.json and tokenizer.json."
        )
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        return ModelNotFoundError(
            f"{path} is a pickle, which can run code when opened and is never read. Give {_FOLDER}."
        )
    return ModelNotFoundError(f"{path} is a file; give the folder that holds the {what}.")


def check_format(folder: Path, what: str) -> None:
    """Refuse a folder that holds a model in another format only.

    Raises:
        ModelError: It holds a GGUF or an ONNX file and nothing that can be loaded.
    """
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return
    if what == "tokenizer" and any(any(folder.glob(name)) for name in _TOKENIZERS):
        return
    for suffix in ("*.gguf", "*.onnx", "onnx/*.onnx"):
        for file in sorted(folder.glob(suffix))[:1]:
            raise ModelError(f"{folder} holds no model that can be loaded: {file} is {_kind(file)}")


def check_tokenizer_files(source: str) -> None:
    """Refuse a folder without any file of a tokenizer; a hub id passes.

    Raises:
        ModelError: There is none.
    """
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZERS):
        raise ModelError(
            f"{source} holds no tokenizer: there is no tokenizer.json. Copy tokenizer.json and "
            "tokenizer_config.json into it from the model that it was made from, or save the "
            "tokenizer there with tokenizer.save_pretrained(...)."
        )


def _kind(path: Path) -> str:
    """What a file of another library is, and what to do with it; empty for other files."""
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if is_gguf or path.suffix == ".gguf":
        return (
            "a GGUF file, the format of llama.cpp. In Python, load it by its file name with "
            f"AutoModelForCausalLM.from_pretrained({str(path.parent)!r}, gguf_file={path.name!r}), "
            "the tokenizer in the same way with AutoTokenizer, and pass the tokenizer to "
            f"FusionLogitsProcessor. Commands need {_FOLDER}."
        )
    if path.suffix == ".onnx":
        return f"an ONNX file, which has no logits processors. Give {_FOLDER}."
    return ""
