"""Reads a calibrator's folder, checking every file, and writes it atomically.

::

    calibrator.json         format, context length, vocabulary, recommended fusion settings, and
                            the probes, if any, on which processors check themselves
    clean/, reference/      one AutoModelForCausalLM folder each: config.json, *.safetensors
    tokenizer.json, tokenizer_config.json
    training.json           how it was trained
    README.md               the card, made from the above
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
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

from fusion_detox.calibrator.card import render_card
from fusion_detox.calibrator.probes import Probe, read_probes
from fusion_detox.config import FusionConfig
from fusion_detox.errors import CalibratorError, ConfigError, DataFileError, ModelError
from fusion_detox.files.atomic import replacing_folder, write_whole
from fusion_detox.files.loading_errors import LOADING_ERRORS, describe, first_line
from fusion_detox.files.models import check_causal, quiet_transformers
from fusion_detox.files.portable import make_portable

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
# Older versions of transformers also write the last two.
_OWNED = {*DISTRIBUTIONS, *HUB_FILES, "special_tokens_map.json", "chat_template.jinja"}

_REMEDY = (
    "Copy the whole folder again from its source, or retrain the calibrator with "
    "`fusion-detox train-calibrator`."
)
_JSON_TYPES = {int: "integer", dict: "object", str: "string", list: "array"}
_FIELDS = {
    "context_length": int,
    "fusion": dict,
    "vocabulary_fingerprint": str,
    "vocabulary_size": int,
    "distributions": list,
}


class Settings(NamedTuple):
    """The content of ``calibrator.json``."""

    context_length: int
    fusion: FusionConfig
    vocabulary_fingerprint: str
    vocabulary_size: int
    distributions: tuple[str, ...]
    probes: tuple[Probe, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The settings as they are written, with the format's version."""
        values = {**self._asdict(), "fusion": self.fusion.to_dict()}
        probes = [probe.to_json() for probe in values.pop("probes")]
        return {
            "format_version": FORMAT_VERSION,
            **values,
            **({"probes": probes} if probes else {}),
        }


def check_rule(config: FusionConfig, has_reference: bool) -> None:
    """Refuse settings that compare two models if there is only one.

    Raises:
        ConfigError: ``config`` needs a reference model and there is none.
    """
    if has_reference:
        return
    if config.contrasts:
        raise ConfigError(
            f"the rule {config.rule!r} needs a reference model, but this calibrator has none. Use "
            "FusionConfig(rule='product') or rule='mixture', or add a reference."
        )
    if config.context_kl is not None:
        raise ConfigError(
            f"context_kl compares the calibrator's two models, so {config.context_kl:g} cannot be "
            "used: this calibrator has no reference. Leave it out."
        )


# --- reading


def read_settings(folder: Path) -> Settings:
    """Read and check ``calibrator.json``.

    Raises:
        CalibratorError: It is missing, is not JSON, has an unsupported format, or a value is
            out of range.
    """
    path = folder / "calibrator.json"
    if not path.is_file():
        raise CalibratorError(
            f"{folder} is not a calibrator: it has no calibrator.json. Give the folder that "
            f"`fusion-detox train-calibrator` or `save_pretrained` wrote; a model to detoxify is "
            f"not a calibrator."
        )
    values = read_json(path)
    found = values.pop("format_version", None)
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise CalibratorError(
            f"{path}: format_version is {found}, but this version of fusion-detox reads only "
            f"{FORMAT_VERSION}. Upgrade it with `pip install --upgrade fusion-detox`."
        )
    if found != FORMAT_VERSION:
        raise CalibratorError(f"{path}: format_version must be 1, but is {found!r}. {_REMEDY}")
    probes = values.pop("probes", [])
    if values.keys() != _FIELDS.keys():
        missing = ", ".join(sorted(_FIELDS.keys() - values)) or "nothing"
        unknown = ", ".join(sorted(values.keys() - _FIELDS)) or "nothing"
        raise CalibratorError(f"{path}: missing {missing}, unknown {unknown}. {_REMEDY}")
    for name, kind in (*_FIELDS.items(), ("probes", list)):
        value = probes if name == "probes" else values[name]
        if type(value) is not kind:
            raise CalibratorError(
                f"{path}: {name} must be a JSON {_JSON_TYPES[kind]}, but is {value!r}. {_REMEDY}"
            )
    values["distributions"] = tuple(values["distributions"])
    if values["distributions"] not in (("clean",), DISTRIBUTIONS):
        raise CalibratorError(
            f"{path}: distributions must be ['clean'] or ['clean', 'reference'], but are "
            f"{list(values['distributions'])}. {_REMEDY}"
        )
    try:
        values["fusion"] = FusionConfig.from_dict(values["fusion"])
    except ConfigError as error:
        raise CalibratorError(f"{path}: in fusion, {error}. Correct it in this file.") from error
    try:
        return Settings(**values, probes=read_probes(probes))
    except CalibratorError as error:
        raise CalibratorError(f"{path}: {error}.") from error


def read_record(folder: Path) -> dict[str, Any]:
    """The training record; empty if the folder has none."""
    path = folder / "training.json"
    return read_json(path) if path.exists() else {}


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from ``tokenizer.json``, whatever class the configuration names.

    Raises:
        CalibratorError: It is missing or damaged.
    """
    path = folder / "tokenizer.json"
    read_json(path)
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json")
    try:
        with quiet_transformers():
            # AutoTokenizer might pick a class that rebuilds parts of tokenizer.json differently.
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
                str(folder), local_files_only=True
            )
            return tokenizer
    except Exception as error:  # tokenizers raises plain exceptions
        raise CalibratorError(
            f"{path} holds no tokenizer: {first_line(error)}. {_REMEDY}"
        ) from error


def read_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load one of the two models after checking its configuration and every tensor.

    Raises:
        CalibratorError: Files or tensors are missing, damaged or unknown, a tensor does not have
            the shape that the configuration implies, a value is not finite, or it is not a causal
            language model.
    """
    config_file = folder / "config.json"
    read_json(config_file)
    for path in _weight_files(folder):
        _tensor_shapes(path)
    options = {"trust_remote_code": False, "local_files_only": True}
    with quiet_transformers():
        try:
            check_causal(AutoConfig.from_pretrained(str(folder), **options), folder)
            auto: Any = AutoModelForCausalLM  # its type stubs lack output_loading_info
            model, info = auto.from_pretrained(
                str(folder),
                **options,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                # _check_loading_info reports the mismatch, with both shapes.
                ignore_mismatched_sizes=True,
            )
        except ModelError as error:
            raise CalibratorError(str(error)) from error
        except LOADING_ERRORS as error:
            raise CalibratorError(
                f"{config_file}: no model can be built from it: {first_line(error)}. If it was "
                f"edited, restore it; if its model type is newer than the installed transformers, "
                f"upgrade transformers."
            ) from error
    _check_loading_info(folder, model, info)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CalibratorError(
                f"{folder}: the tensor {name} holds values that are not finite. Training diverged "
                f"or the file is damaged. {_REMEDY}"
            )
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CalibratorError: The file is missing, damaged or not a JSON object.
        DataFileError: It cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CalibratorError(f"{path} is missing. {_REMEDY}") from error
    except json.JSONDecodeError as error:
        raise CalibratorError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). "
            f"If it was edited, correct that line. {_REMEDY}"
        ) from error
    except UnicodeDecodeError as error:
        raise CalibratorError(
            f"{path}: byte {error.start} is not UTF-8, so the file is damaged. {_REMEDY}"
        ) from error
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not isinstance(values, dict):
        raise CalibratorError(
            f"{path} must hold a JSON object, not {type(values).__name__}. {_REMEDY}"
        )
    return values


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's tensors: a single one, or the shards that an index names."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise CalibratorError(f"{index} names no files in 'weight_map'. {_REMEDY}")
        shards = sorted(set(names.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise CalibratorError(f"{index} points outside its folder: {shard!r}. {_REMEDY}")
            if not (folder / shard).is_file():
                raise CalibratorError(f"{index} names {shard}, which is missing. {_REMEDY}")
        return [folder / shard for shard in shards]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(
        p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickled:
        raise CalibratorError(
            f"{folder} holds {pickled[0]} but no model.safetensors. Pickled weights are not read, "
            f"because opening them can run code. Load them on a machine where you trust them, then "
            f"save them with save_pretrained, which writes safetensors."
        )
    raise CalibratorError(f"{single} is missing. {_REMEDY}")


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor, from the header of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            return {name: list(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CalibratorError(
            f"{path} ({size} bytes) is truncated or is not a safetensors file: "
            f"{first_line(error)}. {_REMEDY}"
        ) from error


def _check_loading_info(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse a model if its files do not hold exactly its tensors."""
    if info["mismatched_keys"]:
        # transformers 4.57 lists only the names; version 5 adds both shapes.
        name = min(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
        shapes: dict[str, list[int]] = {}
        for path in _weight_files(folder):
            shapes.update(_tensor_shapes(path))
        expected = list(model.state_dict()[name].shape)
        raise CalibratorError(
            f"{folder}: the tensor {name} has the shape {shapes.get(name)}, but config.json "
            f"implies {expected}. Either the two files do not belong together, or config.json was "
            f"edited. {_REMEDY}"
        )
    if info["missing_keys"]:
        raise CalibratorError(
            f"{folder}: the weights lack {describe(info['missing_keys'])} of the model that "
            f"config.json describes. {_REMEDY}"
        )
    if info["unexpected_keys"]:
        raise CalibratorError(
            f"{folder}: the weights hold {describe(info['unexpected_keys'])}, which the "
            f"model that config.json describes does not have. {_REMEDY}"
        )
    if info.get("error_msgs"):
        raise CalibratorError(f"{folder}: {info['error_msgs'][0]}. {_REMEDY}")


# --- writing


def write_folder(
    directory: Path,
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    record: dict[str, Any],
    *,
    name: str,
) -> None:
    """Write a complete calibrator, or change nothing.

    Files in an existing calibrator's folder that are not part of the format, such as ``.git``, are
    kept.

    Raises:
        CalibratorError: ``directory`` holds something other than a calibrator.
        DataFileError: It cannot be written, for example because the disk is full.
    """
    directory = directory.expanduser().resolve()
    known = (directory / "calibrator.json").is_file()
    if directory.exists() and not known and (not directory.is_dir() or any(directory.iterdir())):
        raise CalibratorError(
            f"{directory} exists and is not a calibrator, so it is not replaced. Give a new or "
            f"empty folder."
        )
    with (
        _explaining_write_errors(directory),
        replacing_folder(directory, keep=lambda name: name not in _OWNED) as folder,
        quiet_transformers(),
    ):
        for part, model in models.items():
            model.save_pretrained(folder / part)
            make_portable(folder / part)
        _save_tokenizer(tokenizer, folder)
        write_json(folder / "training.json", record)
        write_json(folder / "calibrator.json", settings.to_json())
        _write_text(folder / "README.md", _card(folder, settings, name))
        # safetensors makes its files readable by their owner only.
        for path in folder.glob("*/*.safetensors"):
            path.chmod((folder / "README.md").stat().st_mode)


def write_config(directory: str | os.PathLike[str], config: FusionConfig) -> None:
    """Store new recommended settings in a saved calibrator; the weights stay untouched.

    Rewrites ``calibrator.json`` and the card, each atomically.

    Raises:
        CalibratorError: ``directory`` does not hold a calibrator.
        ConfigError: ``config`` needs a reference model and the calibrator has none.
        DataFileError: It cannot be written.
    """
    folder = Path(directory).expanduser().resolve()
    settings = read_settings(folder)._replace(fusion=config)
    check_rule(config, "reference" in settings.distributions)
    card = _card(folder, settings, folder.name)
    with _explaining_write_errors(folder):
        write_json(folder / "calibrator.json", settings.to_json())
        _write_text(folder / "README.md", card)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write one of the folder's JSON files, atomically.

    Raises:
        CalibratorError: A value cannot be represented in JSON.
        OSError: It cannot be written.
    """
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise CalibratorError(
            f"{path.name} cannot be written: {first_line(error)}. The training record can hold "
            f"only JSON values."
        ) from error
    _write_text(path, text + "\n")


def _write_text(path: Path, text: str) -> None:
    # Half a surrogate pair, from a path that is not UTF-8, becomes an escape that JSON reads back.
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers raises a plain Exception for a full disk.
        if type(error) is Exception:
            raise OSError(first_line(error)) from error
        raise
    make_portable(folder)
    if not (folder / "tokenizer.json").is_file():
        raise CalibratorError(
            f"The tokenizer {type(tokenizer).__name__} cannot be saved as tokenizer.json. Use a "
            f"fast tokenizer, one that the `tokenizers` library runs."
        )


def _card(folder: Path, settings: Settings, name: str) -> str:
    """The card of a folder whose other files are all written."""
    models = {}
    for part in settings.distributions:
        files = map(_tensor_shapes, _weight_files(folder / part))
        parameters = sum(math.prod(shape) for shapes in files for shape in shapes.values())
        kind = read_json(folder / part / "config.json").get("model_type", "unknown")
        models[part] = {"parameters": parameters, "model_type": kind}
    return render_card(name, settings.to_json(), models, read_record(folder))


@contextlib.contextmanager
def _explaining_write_errors(directory: Path) -> Iterator[None]:
    """Report what prevented ``directory`` from being written."""
    try:
        yield
    except DataFileError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataFileError(
            f"{directory} cannot be written: {reason}. Its previous content is unchanged; free "
            f"some space, or give another folder."
        ) from error
