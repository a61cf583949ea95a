"""Reads a calibrator's folder, checking every file, and writes it atomically.

::

    calibrator.json         format, context length, vocabulary, recommended fusion settings, the
                            probes, if any, on which processors check themselves, and digests
    clean/, reference/      one AutoModelForCausalLM folder each: config.json, *.safetensors
    tokenizer.json, tokenizer_config.json
    training.json           how it was trained
    README.md               the card, made from the above
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fusion_detox.calibrator.card import render_card
from fusion_detox.calibrator.digests import (
    TOKENIZER_FILES,
    check_digests,
    file_digests,
    reseal_advice,
    reseal_command,
    settings_digest,
)
from fusion_detox.calibrator.probes import Probe, read_probes
from fusion_detox.calibrator.words import read_words
from fusion_detox.config import FusionConfig
from fusion_detox.errors import CalibratorError, ConfigError, DataFileError, ModelError
from fusion_detox.files import untrusted
from fusion_detox.files.atomic import replacing_folder, write_whole
from fusion_detox.files.config_checks import (
    check_model_config,
    check_tokenizer,
    check_tokenizer_config,
)
from fusion_detox.files.loading_errors import describe, first_line
from fusion_detox.files.models import check_causal, quiet_transformers
from fusion_detox.files.portable import make_portable

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Version 1 had no digests. Version 2 requires them."""
DISTRIBUTIONS = ("clean", "reference")
HUB_FILES = [
    "calibrator.json",
    "training.json",
    "README.md",
    *TOKENIZER_FILES,
    *(f"{part}/{name}" for part in DISTRIBUTIONS for name in ("*.json", "*.safetensors")),
]
_OWNED = {*DISTRIBUTIONS, *HUB_FILES, "chat_template.jinja"}

_REMEDY = (
    "Copy the whole folder again from its source, or retrain the calibrator with "
    "`fusion-detox train-calibrator`."
)
_MAX_INT = 1 << 31
_MAX_BUFFERS = 1 << 28
"""Values that a model may have beside its weights, such as masks: 1 GiB in float32."""
_warned: set[Path] = set()
_JSON_TYPES = {int: "integer", dict: "object", str: "string", list: "array"}
_FIELDS = {
    "context_length": int,
    "fusion": dict,
    "vocabulary_fingerprint": str,
    "vocabulary_size": int,
    "distributions": list,
}
_OPTIONAL = {"probes": list, "words": dict}


class Settings(NamedTuple):
    """The content of ``calibrator.json``."""

    context_length: int
    fusion: FusionConfig
    vocabulary_fingerprint: str
    vocabulary_size: int
    distributions: tuple[str, ...]
    probes: tuple[Probe, ...] = ()
    words: Mapping[str, float] = MappingProxyType({})
    digests: Mapping[str, str] | None = None
    """Of the folder's other files; ``None`` in a folder without digests."""

    def to_json(self) -> dict[str, Any]:
        """The settings as they are written, with the format's version."""
        values = {**self._asdict(), "fusion": self.fusion.to_dict()}
        probes = [probe.to_json() for probe in values.pop("probes")]
        words = dict(values.pop("words"))
        files = values.pop("digests")
        values = {
            "format_version": 1 if files is None else FORMAT_VERSION,
            **values,
            **({"probes": probes} if probes else {}),
            **({"words": words} if words else {}),
        }
        if files is not None:
            values["digests"] = {"files": dict(files)}
            values["digests"]["settings"] = settings_digest(values)
        return values


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


def read_settings(folder: Path, *, verify: bool = True) -> Settings:
    """Read and check ``calibrator.json``.

    Args:
        folder: The calibrator's folder.
        verify: Whether the settings must match their digest, if the file has digests.

    Raises:
        CalibratorError: It is missing, is not JSON, has an unsupported format, was changed without
            writing new digests, or a value is out of range.
    """
    path = folder / "calibrator.json"
    if not path.exists():
        raise CalibratorError(
            f"{folder} is not a calibrator: it has no calibrator.json. Give the folder that "
            f"`fusion-detox train-calibrator` or `save_pretrained` wrote; a model to detoxify is "
            f"not a calibrator."
        )
    content = read_json(path)
    values = dict(content)
    found = values.pop("format_version", None)
    if type(found) is int and found > FORMAT_VERSION:
        raise CalibratorError(
            f"{path}: format_version is {found}, but this version of fusion-detox reads only "
            f"up to {FORMAT_VERSION}. Install the version of fusion-detox that wrote it, or a "
            "later one."
        )
    if type(found) is not int or found < 1:
        raise CalibratorError(f"{path}: format_version must be 1 or 2, but is {found!r}. {_REMEDY}")
    probes, words = (values.pop(name, kind()) for name, kind in _OPTIONAL.items())
    digests = values.pop("digests", None) if found > 1 else None
    _check_fields(values, {"probes": probes, "words": words}, path)
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
        values["probes"], values["words"] = read_probes(probes), read_words(words)
    except CalibratorError as error:
        raise CalibratorError(f"{path}: {error}.") from error
    if found > 1:
        values["digests"] = _read_digests(digests, path)
        if verify and settings_digest(content) != content["digests"]["settings"]:
            raise CalibratorError(
                f"{path} was edited or damaged: its settings do not match their digest. "
                f"{reseal_advice(folder)}"
            )
    return Settings(**values)


def check_folder(folder: Path, settings: Settings) -> None:
    """Refuse a folder whose files do not match the digests in ``calibrator.json``.

    A folder without digests gives a warning, once per process.

    Raises:
        CalibratorError: Files are missing, damaged, exchanged or added.
        DataFileError: A file cannot be read.
    """
    if settings.digests is not None:
        check_digests(folder, settings.digests, settings.distributions)
        return
    key = folder.resolve()
    if key not in _warned:
        _warned.add(key)
        logger.warning(
            "%s has no digests, so damaged or exchanged files are not noticed. Add them with: %s",
            folder,
            reseal_command(folder),
        )


def check_entries(folder: Path) -> None:
    """Refuse a folder that holds anything but regular files, folders, and links to them.

    Raises:
        CalibratorError: It holds a named pipe, a device, a socket, or a link to one.
        DataFileError: It cannot be read.
    """
    try:
        paths = [p for part in ("", *DISTRIBUTIONS) for p in sorted((folder / part).glob("*"))]
    except OSError as error:
        raise DataFileError(f"{folder} cannot be read: {error.strerror or error}.") from error
    for path in paths:
        try:
            if path.exists() and not path.is_dir():
                untrusted.check_regular(path)
        except OSError as error:
            raise CalibratorError(
                f"{path} cannot be read: {error.strerror or error}. {_REMEDY}"
            ) from error


def read_record(folder: Path) -> dict[str, Any]:
    """The training record; empty if the folder has none."""
    path = folder / "training.json"
    # Measurements in it may be undefined.
    return read_json(path, finite=False) if path.exists() else {}


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from ``tokenizer.json``, whatever class the configuration names.

    Raises:
        CalibratorError: It is missing or damaged.
    """
    path = folder / "tokenizer.json"
    checks = {"tokenizer.json": check_tokenizer, "tokenizer_config.json": check_tokenizer_config}
    for name in TOKENIZER_FILES:
        if path.name == name or (folder / name).exists():
            values = read_json(folder / name)
            try:
                checks.get(name, check_tokenizer_config)(values, folder / name)
            except ModelError as error:
                raise CalibratorError(str(error)) from error
    try:
        with quiet_transformers():
            # AutoTokenizer might pick a class that rebuilds parts of tokenizer.json differently.
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
                str(folder), local_files_only=True
            )
            return tokenizer
    except BaseException as error:
        # tokenizers raises plain exceptions and, if it panics, one that is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
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
    _check_configs(folder)
    shapes = _shapes(folder)
    options = {"trust_remote_code": False, "local_files_only": True}
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(str(folder), **options)
            check_causal(config, folder)
            _check_size(folder, config, shapes)
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
        except CalibratorError:
            raise
        except ModelError as error:
            raise CalibratorError(str(error)) from error
        except Exception as error:
            raise CalibratorError(
                f"{config_file}: no model can be built from it: {first_line(error)}. If it was "
                f"edited, restore it; if its model type is newer than the installed transformers, "
                f"upgrade transformers."
            ) from error
    _check_loading_info(folder, model, info, shapes)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise CalibratorError(
                f"{folder}: the tensor {name} holds values that are not finite. Training diverged "
                f"or the file is damaged. {_REMEDY}"
            )
        if tensor.dim() > 1 and not bool(tensor.any()):
            raise CalibratorError(
                f"{folder}: all values of the tensor {name} are zero, so it was never trained or "
                f"the file is damaged. {_REMEDY}"
            )
    model.requires_grad_(False)
    loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object, which must hold only finite numbers unless ``finite`` is false.

    Raises:
        CalibratorError: The file is missing, damaged or not a JSON object.
        DataFileError: It cannot be read.
    """
    try:
        values = untrusted.read_json(path, finite=finite)
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
    except ValueError as error:
        raise CalibratorError(f"{path} is damaged: {error}. {_REMEDY}") from error
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not isinstance(values, dict):
        raise CalibratorError(
            f"{path} must hold a JSON object, not {type(values).__name__}. {_REMEDY}"
        )
    return values


def _check_fields(values: Mapping[str, Any], optional: Mapping[str, Any], path: Path) -> None:
    """Check the names and the types of the values in ``calibrator.json``."""
    if values.keys() != _FIELDS.keys():
        missing = ", ".join(sorted(_FIELDS.keys() - values)) or "nothing"
        unknown = ", ".join(sorted(values.keys() - _FIELDS)) or "nothing"
        raise CalibratorError(f"{path}: missing {missing}, unknown {unknown}. {_REMEDY}")
    given = {**values, **optional}
    for name, kind in {**_FIELDS, **_OPTIONAL}.items():
        value = given[name]
        if type(value) is not kind:
            raise CalibratorError(
                f"{path}: {name} must be a JSON {_JSON_TYPES[kind]}, but is {value!r}. {_REMEDY}"
            )
    for name, value in (*values.items(), *values["fusion"].items()):
        if type(value) is int and abs(value) >= _MAX_INT:
            raise CalibratorError(f"{path}: {name} must be below 2**31, but is {value}. {_REMEDY}")


def _read_digests(values: object, path: Path) -> dict[str, str]:
    files = values.get("files") if isinstance(values, dict) else None
    if (
        not isinstance(values, dict)
        or values.keys() != {"files", "settings"}
        or not isinstance(files, dict)
        or not all(isinstance(one, str) for one in (values["settings"], *files.values()))
    ):
        raise CalibratorError(
            f"{path}: digests must hold 'files' and 'settings', but it is {str(values)[:80]!r}. "
            f"{reseal_advice(path.parent)}"
        )
    return files


def _check_configs(folder: Path, shown: Path | None = None) -> None:
    """Check a model's JSON files before transformers reads them.

    Args:
        folder: The model's folder.
        shown: Its path in messages, if it is a temporary folder.
    """
    shown = shown or folder
    path = folder / "adapter_config.json"
    if path.exists():  # transformers would load the model that it names instead
        raise CalibratorError(
            f"{path}: a calibrator's model cannot be an adapter. Merge it into its base model with "
            f"`merge_and_unload()`, and save that."
        )
    config = read_json(folder / "config.json")
    try:
        check_model_config(config, shown / "config.json")
        path = folder / "generation_config.json"
        if path.exists():
            sizes = {"vocab_size": config.get("vocab_size"), **read_json(path)}
            check_model_config(sizes, shown / path.name)
    except ModelError as error:
        raise CalibratorError(str(error)) from error


def _check_size(folder: Path, config: PretrainedConfig, shapes: Mapping[str, list[int]]) -> None:
    """Refuse a configuration that needs far more memory than the weights take.

    The model is built without memory for its values.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(shapes):
        raise CalibratorError(
            f"{folder / 'config.json'}: num_hidden_layers is {layers}, but the weights hold only "
            f"{len(shapes)} tensors. {_REMEDY}"
        )
    auto: Any = AutoModelForCausalLM  # its type stubs lack annotations
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
    except NotImplementedError:  # some families compute with values while they are built
        return
    tensors = [*model.parameters(), *model.buffers()]
    needed, held = sum(t.numel() for t in tensors), sum(map(math.prod, shapes.values()))
    if needed > 2 * held + _MAX_BUFFERS:
        _check_shapes(folder, {n: list(t.shape) for n, t in model.state_dict().items()}, shapes)
        raise CalibratorError(
            f"{folder / 'config.json'} implies a model of {needed:,} values, but the weights hold "
            f"only {held:,}. {_REMEDY}"
        )


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


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor of a model."""
    shapes: dict[str, list[int]] = {}
    for path in _weight_files(folder):
        shapes.update(_tensor_shapes(path))
    return shapes


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


def _check_shapes(
    folder: Path, expected: Mapping[str, list[int]], shapes: Mapping[str, list[int]]
) -> None:
    """Refuse tensors that do not have the shape that ``config.json`` implies."""
    wrong = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    for name in sorted(wrong)[:1]:
        raise CalibratorError(
            f"{folder}: the tensor {name} has the shape {shapes.get(name)}, but config.json "
            f"implies {expected[name]}. Either the two files do not belong together, or "
            f"config.json was edited. {_REMEDY}"
        )


def _check_loading_info(
    folder: Path,
    model: PreTrainedModel,
    info: dict[str, Any],
    shapes: Mapping[str, list[int]],
) -> None:
    """Refuse a model if its files do not hold exactly its tensors."""
    if info["mismatched_keys"]:
        # transformers 4.57 lists only the names; version 5 adds both shapes.
        name = min(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
        _check_shapes(folder, {name: list(model.state_dict()[name].shape)}, shapes)
        raise CalibratorError(
            f"{folder}: the tensor {name} does not have the shape that config.json implies. "
            f"{_REMEDY}"
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
            _check_configs(folder / part, Path(part))
        _save_tokenizer(tokenizer, folder)
        write_json(folder / "training.json", record)
        settings = settings._replace(digests=file_digests(folder, settings.distributions))
        write_json(folder / "calibrator.json", settings.to_json())
        _write_text(folder / "README.md", _card(folder, settings, name))
        # safetensors makes its files readable by their owner only.
        for path in folder.glob("*/*.safetensors"):
            path.chmod((folder / "README.md").stat().st_mode)


def write_config(
    directory: str | os.PathLike[str],
    config: FusionConfig,
    words: Mapping[str, float] | None = None,
) -> None:
    """Store new recommended settings in a saved calibrator; the weights stay untouched.

    Rewrites ``calibrator.json``, with a new digest of the settings, and the card, each atomically.
    The digests of other files stay, so that damage to those is still noticed.

    Args:
        directory: The calibrator's folder.
        config: The settings.
        words: The listed words; by default, they stay as they are.

    Raises:
        CalibratorError: ``directory`` does not hold a calibrator, its settings do not match their
            digest, or a listed word is not one.
        ConfigError: ``config`` needs a reference model and the calibrator has none.
        DataFileError: It cannot be written.
    """
    folder = Path(directory).expanduser().resolve()
    settings = read_settings(folder)._replace(fusion=config)
    if words is not None:
        settings = settings._replace(words=read_words(words))
    check_rule(config, "reference" in settings.distributions)
    if settings.digests is None:
        settings = settings._replace(digests=file_digests(folder, settings.distributions))
    card = _card(folder, settings, folder.name)
    with _explaining_write_errors(folder):
        write_json(folder / "calibrator.json", settings.to_json())
        _write_text(folder / "README.md", card)


def write_digests(directory: str | os.PathLike[str]) -> int:
    """Accept a saved calibrator's files as they are now, by writing new digests.

    Returns:
        The number of files with a digest, without ``calibrator.json``.

    Raises:
        CalibratorError: ``directory`` does not hold a calibrator.
        DataFileError: A file cannot be read, or ``calibrator.json`` cannot be written.
    """
    folder = Path(directory).expanduser().resolve()
    settings = read_settings(folder, verify=False)
    digests = file_digests(folder, settings.distributions)
    with _explaining_write_errors(folder):
        write_json(folder / "calibrator.json", settings._replace(digests=digests).to_json())
    return len(digests)


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
    # The name of a source that is not UTF-8 has half characters, which become question marks.
    write_whole(path, text.encode("utf-8", "replace"))


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
