"""Alignments on disk: saved beside the calibrator, with one folder for each target.

::

    <calibrator>/alignments/<fingerprint>/
        alignment.safetensors   the matrix, and sampled rows of both embeddings
        alignment.json          settings, report, fingerprints, digest of all this and the tensors

The fingerprint is that of the target's embedding and vocabulary. If the calibrator is shipped,
downloaded or read-only, its alignments are saved in the user's cache folder instead, in a folder
named after the fingerprint of the calibrator's vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusion_detox.alignment.alignment import Alignment
from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.errors import AlignmentError, ConfigError, DataFileError
from fusion_detox.files.atomic import UNFINISHED, recover, replacing_folder
from fusion_detox.files.cache_root import cache_root
from fusion_detox.files.loading_errors import first_line
from fusion_detox.files.untrusted import read_json

if TYPE_CHECKING:
    from fusion_detox.calibrator.calibrator import Calibrator

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Version 1 had no digest."""
FOLDER = "alignments"
_JSON, _SAFETENSORS = "alignment.json", "alignment.safetensors"
_TENSORS = ("matrix", "calibrator_rows", "target_rows")
_FIELDS = {
    *("format_version", "fingerprint", "vocabularies", "calibrator_ids", "target_ids"),
    *("config", "report"),
}
_REMEDY = "Learn it again with `fusion-detox align`, or delete the folder."


def alignment_folders(calibrator: Calibrator) -> list[Path]:
    """Return the folders that hold a calibrator's alignments; new ones go to the first."""
    folders = [cache_root() / FOLDER / calibrator.tokens.fingerprint()[:16]]
    own = calibrator.folder
    if own is not None:
        # Shipped and downloaded calibrators, whose name is not a path, are not the user's to edit.
        is_users = Path(calibrator.name or "").expanduser().resolve() == own.resolve()
        folders.insert(0 if is_users and os.access(own, os.W_OK) else 1, own / FOLDER)
    return folders


def saved_alignments(calibrator: Calibrator) -> list[Path]:
    """Return the folders of all saved alignments, including damaged ones."""
    return sorted(
        path
        for folder in alignment_folders(calibrator)
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_dir() and UNFINISHED not in path.name
    )


def save_alignment(
    alignment: Alignment,
    calibrator: Calibrator,
    directory: str | os.PathLike[str] | None = None,
) -> Path:
    """Save an alignment atomically.

    Args:
        alignment: The result of ``align``.
        calibrator: The calibrator that it was learned for.
        directory: An empty or new folder, or one that holds an alignment, which is replaced. By
            default, a folder beside the calibrator or, if the calibrator is shipped, downloaded or
            read-only, in the user's cache.

    Returns:
        The folder that was written.

    Raises:
        AlignmentError: ``directory`` holds something else.
        DataFileError: The folder cannot be written; nothing was changed.
    """
    if directory is None:
        folder = alignment_folders(calibrator)[0] / alignment.fingerprint
    else:
        folder = Path(directory).expanduser().resolve()
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not files <= {_JSON, _SAFETENSORS} or (folder.exists() and not folder.is_dir()):
        raise AlignmentError(
            f"{folder} exists and is not an alignment, so it is not replaced: give a new or empty "
            "folder"
        )
    values = {
        "format_version": FORMAT_VERSION,
        "fingerprint": alignment.fingerprint,
        "vocabularies": list(alignment.vocabularies),
        "calibrator_ids": list(alignment.calibrator_ids),
        "target_ids": list(alignment.target_ids),
        "config": alignment.config.to_dict(),
        "report": alignment.report,
    }
    data = save({name: getattr(alignment, name).contiguous() for name in _TENSORS})
    text = json.dumps({**values, "sha256": _digest(values, data)}, indent=2)
    try:
        with replacing_folder(folder) as new:
            (new / _SAFETENSORS).write_bytes(data)
            (new / _JSON).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataFileError(
            f"{folder} cannot be written: {reason}. Its earlier content is unchanged; free some "
            "space, or give another folder with --out"
        ) from error
    return folder


def load_alignment(directory: str | os.PathLike[str]) -> Alignment:
    """Load an alignment from its folder and check it.

    Raises:
        AlignmentError: The folder holds no alignment, or an incomplete or damaged one, or one that
            this version does not support.
    """
    folder = Path(directory).expanduser()
    recover(folder)
    json_file, tensors_file = folder / _JSON, folder / _SAFETENSORS
    for file in (json_file, tensors_file):
        if not file.is_file():
            problem = "is not a regular file" if file.exists() else "is missing"
            raise AlignmentError(
                f"{file} {problem}, so {folder} holds no complete alignment. {_REMEDY}"
            )
    try:
        values, data = read_json(json_file), tensors_file.read_bytes()
        version, digest = values["format_version"], values.pop("sha256", None)
        if version not in (1, FORMAT_VERSION):
            raise AlignmentError(
                f"{json_file}: format_version is {version!r}, but this version of fusion-detox "
                f"reads {FORMAT_VERSION}. {_REMEDY}"
            )
        if digest != (_digest(values, data) if version > 1 else None):
            raise AlignmentError(
                f"{folder} is damaged or was edited: its content does not match its digest. "
                f"{_REMEDY}"
            )
        if values.keys() != _FIELDS:
            names = ", ".join(map(repr, sorted(values.keys() ^ _FIELDS)))
            raise ValueError(f"{names} is unknown or missing")
        config = _read_config(values["config"], json_file)
        tensors = load(data)
        found = Alignment(
            config=config,
            report=dict(values["report"]),
            fingerprint=str(values["fingerprint"]),
            calibrator_ids=tuple(map(int, values["calibrator_ids"])),
            target_ids=tuple(map(int, values["target_ids"])),
            vocabularies=(str(values["vocabularies"][0]), str(values["vocabularies"][1])),
            **{name: tensors[name] for name in _TENSORS},
        )
    except AlignmentError:
        raise
    except (SafetensorError, OSError) as error:
        raise AlignmentError(f"{folder} is damaged: {first_line(error)}. {_REMEDY}") from error
    except (
        *(ValueError, KeyError, TypeError, AttributeError, IndexError, ConfigError),
        *(OverflowError, RecursionError),
    ) as error:
        raise AlignmentError(f"{json_file} is damaged: {first_line(error)}. {_REMEDY}") from error
    _check(folder, found)
    if version == 1:
        logger.warning(
            "%s has no digest, so damage may not be noticed. To add one, learn the alignment again "
            "with `fusion-detox align`.",
            folder,
        )
    return found


def _digest(values: Mapping[str, Any], data: bytes) -> str:
    """SHA-256 of all values in the JSON file but the digest, and of the tensors' file."""
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.sha256(text.encode() + hashlib.sha256(data).digest()).hexdigest()


def _read_config(values: dict[str, Any], path: Path) -> AlignmentConfig:
    """Settings from JSON, without ``ridge`` and ``negatives_from``, which no longer exist."""
    values = dict(values)
    values.pop("ridge", None)
    in_batch = values.pop("negatives_from", "drawn") == "batch" and values.get("epochs")
    if in_batch or values.get("start") in ("ridge", "logits"):
        removed = "negatives_from='batch'" if in_batch else f"start={values['start']!r}"
        raise AlignmentError(
            f"{path} was learned with {removed}, which this version no longer supports, because "
            f"the default start is better (docs/aligned.md). {_REMEDY}"
        )
    return AlignmentConfig().replace(**values)


def _check(folder: Path, found: Alignment) -> None:
    matrix, source, target = found.matrix, found.calibrator_rows, found.target_rows
    fits = (
        matrix.dim() == source.dim() == target.dim() == 2
        and matrix.shape == (source.shape[1], target.shape[1])
        and len(source) == len(found.calibrator_ids)
        and len(target) == len(found.target_ids)
        and all(tensor.dtype == torch.float32 for tensor in (matrix, source, target))
    )
    if not fits:
        raise AlignmentError(
            f"{folder}: the tensors in {_SAFETENSORS} do not fit together or do not fit {_JSON} "
            f"(the matrix has the shape {list(matrix.shape)}, the sampled rows "
            f"{list(source.shape)} and {list(target.shape)}); perhaps files of two alignments "
            f"were mixed. {_REMEDY}"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (matrix, source, target)):
        raise AlignmentError(f"{folder} holds values that are not finite. {_REMEDY}")


def find_alignment(
    calibrator: Calibrator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Alignment:
    """Find the saved alignment of a calibrator and a target; prefer one of output embeddings.

    Raises:
        AlignmentError: No saved alignment matches these two models and their current weights.
    """
    found: list[Alignment] = []
    refused: list[str] = []
    for folder in saved_alignments(calibrator):
        try:
            alignment = load_alignment(folder)
            alignment.check_target(model, tokenizer)
            alignment.check_calibrator(calibrator)
            found.append(alignment)
        except AlignmentError as error:
            refused.append(f"{folder.name[:12]}: {error}")
    if found:
        return min(found, key=lambda one: one.config.embeddings != "output")
    name = model.config.name_or_path or type(model).__name__
    reasons = f" (rejected {'; '.join(refused)})" if refused else ""
    raise AlignmentError(
        f"no alignment of the calibrator {calibrator.name or 'given'} with {name} was found: make "
        "one with `fusion-detox align --calibrator CALIBRATOR --target MODEL`, or make it with "
        f"fusion_detox.align() and pass it as alignment={reasons}"
    )


def describe_alignments(calibrator: Calibrator) -> list[dict[str, Any]]:
    """List the saved alignments, JSON-ready; a damaged one has an ``"error"`` and no report."""
    rows: list[dict[str, Any]] = []
    for folder in saved_alignments(calibrator):
        row: dict[str, Any] = {"folder": str(folder)}
        try:
            alignment = load_alignment(folder)
            alignment.check_calibrator(calibrator)
            row |= {"config": alignment.config.to_dict(), "report": alignment.report}
        except AlignmentError as error:
            row["error"] = str(error)
        rows.append(row)
    return rows
