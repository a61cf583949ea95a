"""Writing a calibrator's folder so that it is whole or not there."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusion_detox.calibrator.card import render_card
from fusion_detox.calibrator.reading import (
    DISTRIBUTIONS,
    FORMAT_VERSION,
    HUB_FILES,
    Settings,
    check_rule,
    read_json,
    read_record,
    read_settings,
    tensor_shapes,
    weight_files,
)
from fusion_detox.config import FusionConfig
from fusion_detox.errors import CalibratorError, DataFileError
from fusion_detox.files.atomic import replacing_folder
from fusion_detox.files.loading_errors import first_line
from fusion_detox.files.models import make_portable, quiet_transformers

# Written by older versions of transformers beside the files above.
_OURS = {*DISTRIBUTIONS, *HUB_FILES, "special_tokens_map.json", "chat_template.jinja"}


def write_folder(
    directory: Path,
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    record: dict[str, Any],
    *,
    name: str,
) -> None:
    """Write a whole calibrator, or nothing.

    Everything goes into a new folder beside ``directory`` first, which then takes its place.
    What else lies in an older calibrator's folder, such as ``.git``, stays.

    Raises:
        CalibratorError: ``directory`` holds something other than a calibrator.
        DataFileError: It cannot be written, for example because the disk is full.
    """
    directory = directory.expanduser().resolve()
    known = (directory / "calibrator.json").is_file()
    if directory.exists() and not known and (not directory.is_dir() or any(directory.iterdir())):
        raise CalibratorError(
            f"{directory} exists and is no calibrator, so it is not replaced. Give a new folder "
            f"or an empty one."
        )
    with (
        _written(directory),
        replacing_folder(directory, keep=lambda name: name not in _OURS) as folder,
        quiet_transformers(),
    ):
        for part, model in models.items():
            model.save_pretrained(folder / part)
            make_portable(folder / part)
        _save_tokenizer(tokenizer, folder)
        _write_json(folder / "training.json", record)
        _write_json(folder / "calibrator.json", _to_json(settings))
        (folder / "README.md").write_text(_card(folder, name), encoding="utf-8")
        # safetensors gives its files to their owner only.
        for path in folder.glob("*/*.safetensors"):
            path.chmod((folder / "README.md").stat().st_mode)


def write_config(directory: str | os.PathLike[str], config: FusionConfig) -> None:
    """Store other recommended settings in a saved calibrator, weights untouched.

    Rewrites ``calibrator.json`` and the card, each in one go.

    Raises:
        CalibratorError: ``directory`` holds no calibrator, or one without reference while
            ``config`` needs it.
        DataFileError: It cannot be written.
    """
    folder = Path(directory).expanduser().resolve()
    settings = read_settings(folder)._replace(fusion=config)
    check_rule(config, "reference" in settings.distributions)
    with _written(folder):
        for name in ("calibrator.json", "README.md"):
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            os.close(handle)
            path = Path(temporary)
            try:
                if name == "calibrator.json":
                    _write_json(path, _to_json(settings))
                else:
                    path.write_text(_card(folder, folder.name), encoding="utf-8")
                path.chmod((folder / "calibrator.json").stat().st_mode)
                os.replace(path, folder / name)
            except BaseException:
                path.unlink(missing_ok=True)
                raise


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers raises nothing more special than this, for a full disk too.
        if type(error) is Exception:
            raise OSError(first_line(error)) from error
        raise
    make_portable(folder)
    if not (folder / "tokenizer.json").is_file():
        raise CalibratorError(
            f"The tokenizer {type(tokenizer).__name__} cannot be saved as tokenizer.json. Use one "
            f"that the `tokenizers` library runs (a fast tokenizer)."
        )


def _to_json(settings: Settings) -> dict[str, Any]:
    values = settings._asdict()
    return {"format_version": FORMAT_VERSION, **values, "fusion": settings.fusion.to_dict()}


def _card(folder: Path, name: str) -> str:
    """The card of a folder that is complete but for it."""
    parts = {}
    for part in read_settings(folder).distributions:
        shapes = [s for path in weight_files(folder / part) for s in tensor_shapes(path).values()]
        elements = sum(math.prod(shape) for shape in shapes)
        kind = read_json(folder / part / "config.json").get("model_type", "unknown")
        parts[part] = {"parameters": elements, "model_type": kind}
    return render_card(
        {
            "name": name,
            "calibrator": read_json(folder / "calibrator.json"),
            "models": parts,
            "record": read_record(folder),
        }
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise CalibratorError(
            f"{path.name} cannot be written: {first_line(error)}. The training record may hold "
            f"only what JSON can."
        ) from error
    path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _written(directory: Path) -> Iterator[None]:
    """Say what kept ``directory`` from being written."""
    try:
        yield
    except SafetensorError as error:  # safetensors reports a full disk as one of its own
        raise _unwritten(directory, first_line(error)) from error
    except DataFileError:
        raise
    except OSError as error:
        raise _unwritten(directory, error.strerror or first_line(error)) from error


def _unwritten(directory: Path, reason: str) -> DataFileError:
    return DataFileError(
        f"{directory} cannot be written: {reason}. What was there before is unchanged; make room "
        f"or give another folder."
    )
