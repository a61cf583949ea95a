"""What a calibrator's folder holds, and reading it with everything checked.

::

    calibrator.json         format, context length, vocabulary, recommended fusion settings
    clean/, reference/      one AutoModelForCausalLM folder each: config.json, *.safetensors
    tokenizer.json, tokenizer_config.json
    training.json           how it was trained
    README.md               the card, made from the above
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fusion_detox.config import FusionConfig
from fusion_detox.errors import CalibratorError, ConfigError, DataFileError, ModelError
from fusion_detox.files.loading_errors import LOADING_ERRORS, describe, first_line
from fusion_detox.files.models import check_causal, quiet_transformers

FORMAT_VERSION = 1
DISTRIBUTIONS = ("clean", "reference")
HUB_FILES = [
    "calibrator.json",
    "training.json",
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
    *(f"{part}/{name}" for part in DISTRIBUTIONS for name in ("*.json", "*.safetensors")),
]

_MEND = (
    "Copy the whole folder again from where it came, or train it again with "
    "`fusion-detox train-calibrator`."
)


class Settings(NamedTuple):
    """What ``calibrator.json`` holds."""

    context_length: int
    fusion: FusionConfig
    vocabulary_fingerprint: str
    vocabulary_size: int
    distributions: tuple[str, ...]


def read_settings(folder: Path) -> Settings:
    """``calibrator.json``, checked.

    Raises:
        CalibratorError: It is missing, no JSON, of another format, or has a value out of range.
    """
    path = folder / "calibrator.json"
    if not path.is_file():
        raise CalibratorError(
            f"{folder} is no calibrator: it has no calibrator.json. Give the folder that "
            f"`fusion-detox train-calibrator` or `save_pretrained` wrote; a model to detoxify is "
            f"not a calibrator."
        )
    values = read_json(path)
    found = values.pop("format_version", None)
    if found != FORMAT_VERSION:
        if isinstance(found, int) and found > FORMAT_VERSION:
            raise CalibratorError(
                f"{path}: format_version is {found}, and this version of fusion-detox reads "
                f"{FORMAT_VERSION}. Upgrade it with `pip install --upgrade fusion-detox`."
            )
        raise CalibratorError(f"{path}: format_version must be 1, but is {found!r}. {_MEND}")
    expected = {
        "context_length": int,
        "fusion": dict,
        "vocabulary_fingerprint": str,
        "vocabulary_size": int,
        "distributions": list,
    }
    if sorted(values) != sorted(expected):
        missing = ", ".join(sorted(set(expected) - set(values))) or "nothing"
        unknown = ", ".join(sorted(set(values) - set(expected))) or "nothing"
        raise CalibratorError(f"{path}: missing {missing}, unknown {unknown}. {_MEND}")
    for name, kind in expected.items():
        if type(values[name]) is not kind:
            raise CalibratorError(
                f"{path}: {name} must be a JSON {_JSON[kind]}, but is {values[name]!r}. {_MEND}"
            )
    if tuple(values["distributions"]) not in (("clean",), DISTRIBUTIONS):
        raise CalibratorError(
            f"{path}: distributions must be ['clean'] or ['clean', 'reference'], but is "
            f"{values['distributions']!r}. {_MEND}"
        )
    try:
        values["fusion"] = FusionConfig.from_dict(values["fusion"])
    except ConfigError as error:
        raise CalibratorError(f"{path}: in fusion, {error}. Correct it there.") from error
    values["distributions"] = tuple(values["distributions"])
    return Settings(**values)


def read_record(folder: Path) -> dict[str, Any]:
    """The training record; empty where there is none."""
    path = folder / "training.json"
    return read_json(path) if path.exists() else {}


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, from ``tokenizer.json`` alone.

    Raises:
        CalibratorError: It is missing or damaged.
    """
    path = folder / "tokenizer.json"
    read_json(path)
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json")
    try:
        with quiet_transformers():
            # Not AutoTokenizer: the class of a family may rebuild what the file already says.
            found: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
                str(folder), local_files_only=True
            )
            return found
    except Exception as error:  # tokenizers raises nothing more special
        raise CalibratorError(f"{path} holds no tokenizer: {first_line(error)}. {_MEND}") from error


def read_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """One of the two models, after a check of its configuration and of every tensor.

    Raises:
        CalibratorError: Files or tensors are missing, damaged, unknown, not of the shape that
            the configuration asks for, or hold values that are not finite.
        ModelError: It is no causal language model.
    """
    settings_file = folder / "config.json"
    read_json(settings_file)
    for path in weight_files(folder):
        tensor_shapes(path)
    options = {"trust_remote_code": False, "local_files_only": True}
    with quiet_transformers():
        try:
            check_causal(AutoConfig.from_pretrained(str(folder), **options), folder)
            auto: Any = AutoModelForCausalLM  # its types do not know output_loading_info
            model, info = auto.from_pretrained(
                str(folder),
                **options,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                # So that they come in the report below, with both shapes.
                ignore_mismatched_sizes=True,
            )
        except ModelError:
            raise
        except LOADING_ERRORS as error:
            raise CalibratorError(
                f"{settings_file}: no model can be built from it: {first_line(error)}. If it was "
                f"edited, restore it; if its type is newer than the installed transformers, "
                f"upgrade them."
            ) from error
    _check_report(folder, model, info)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CalibratorError(
                f"{folder}: the tensor {name} holds values that are not finite numbers. Its "
                f"training diverged or the file is damaged. {_MEND}"
            )
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def check_rule(config: FusionConfig, has_reference: bool) -> None:
    """Refuse what compares two models where there is only one."""
    if config.contrasts and not has_reference:
        raise ConfigError(
            f"the rule {config.rule!r} needs a reference model, and this calibrator has none. Use "
            "FusionConfig(rule='product') or rule='mixture', or give a reference."
        )
    if config.context_kl is not None and not has_reference:
        raise ConfigError(
            "context_kl compares the calibrator's two models, but this one has no reference: "
            "leave it out"
        )


_JSON = {int: "integer", dict: "object", str: "string", list: "array"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; what is wrong with it is said by file and line."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CalibratorError(f"{path} is missing. {_MEND}") from error
    except json.JSONDecodeError as error:
        raise CalibratorError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). "
            f"If it was edited, correct that place. {_MEND}"
        ) from error
    except UnicodeDecodeError as error:
        raise CalibratorError(
            f"{path}: byte {error.start} is not UTF-8, so the file is damaged. {_MEND}"
        ) from error
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not isinstance(values, dict):
        raise CalibratorError(
            f"{path} must hold a JSON object, not {type(values).__name__}. {_MEND}"
        )
    return values


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's tensors: one, or the shards that an index names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise CalibratorError(f"{index} names no files in 'weight_map'. {_MEND}")
        shards = sorted(set(names.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise CalibratorError(f"{index} points outside its folder: {outside[0]!r}. {_MEND}")
        for shard in shards:
            if not (folder / shard).is_file():
                raise CalibratorError(f"{index} names {shard}, which is missing. {_MEND}")
        return [folder / shard for shard in shards]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    other = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if other:
        raise CalibratorError(
            f"{folder} holds {other[0]} but no model.safetensors. Pickled weights are not read, "
            f"because opening them can run code. Load them where you trust them and save them "
            f"again with save_pretrained, which writes safetensors."
        )
    raise CalibratorError(f"{single} is missing. {_MEND}")


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor, from the header of a safetensors file.

    Raises:
        CalibratorError: The file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            return {name: list(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CalibratorError(
            f"{path} ({size} bytes) is truncated or no safetensors file: {first_line(error)}. "
            f"{_MEND}"
        ) from error


def _check_report(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse a model that was not filled by exactly the tensors of its files."""
    if info["mismatched_keys"]:
        # Names only in transformers 4.57, with both shapes in 5.
        name = min(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
        shapes: dict[str, list[int]] = {}
        for path in weight_files(folder):
            shapes.update(tensor_shapes(path))
        expected = list(model.state_dict()[name].shape)
        raise CalibratorError(
            f"{folder}: the tensor {name} has the shape {shapes.get(name)}, but config.json asks "
            f"for {expected}. The two files do not belong together or config.json was edited. "
            f"{_MEND}"
        )
    for kind, keys in (("lack", "missing_keys"), ("hold, unknown,", "unexpected_keys")):
        if info[keys]:
            raise CalibratorError(
                f"{folder}: the weights {kind} {describe(info[keys])} of the model that "
                f"config.json describes. {_MEND}"
            )
    if info.get("error_msgs"):
        raise ModelError(f"{folder}: {info['error_msgs'][0]}. {_MEND}")
