"""Alignments on disk: beside the calibrator, a folder for each target.

::

    <calibrator>/alignments/<fingerprint>/
        alignment.safetensors   the matrix, and sampled rows of both embeddings
        alignment.json          settings, report, fingerprints

The fingerprint is that of the target's embedding and vocabulary. For a calibrator that is shipped
or downloaded, the user's cache folder holds them, by the calibrator's vocabulary.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusion_detox.alignment.alignment import Alignment
from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.errors import AlignmentError, ConfigError, DataFileError
from fusion_detox.files.atomic import UNFINISHED, replacing_folder
from fusion_detox.files.loading_errors import first_line

if TYPE_CHECKING:
    from fusion_detox.calibrator.calibrator import Calibrator

FORMAT_VERSION = 1
FOLDER = "alignments"
_TENSORS = ("matrix", "calibrator_rows", "target_rows")
_MEND = "Learn it again with `fusion-detox align`, or delete the folder."


def alignment_folders(calibrator: Calibrator) -> list[Path]:
    """Where a calibrator's alignments are looked for; they are saved in the first one."""
    named = os.environ.get("FUSION_DETOX_CACHE")
    root = Path(named) if named else Path.home() / ".cache" / "fusion-detox"
    folders = [root / FOLDER / calibrator.tokens.fingerprint()[:16]]
    own = calibrator.folder
    if own is not None:
        # What is found by a shipped name or a hub id is not the user's to write to.
        users = Path(calibrator.name or "").expanduser().resolve() == own.resolve()
        folders.insert(0 if users and os.access(own, os.W_OK) else 1, own / FOLDER)
    return folders


def saved_alignments(calibrator: Calibrator) -> list[Path]:
    """The folders of all alignments that are there, whole or not."""
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
    """Writes an alignment so that it is whole or not there.

    Args:
        alignment: What ``align`` gave.
        calibrator: What it was learned for.
        directory: A folder of its own for it; by default one beside the calibrator or, where that
            is shipped, downloaded or read-only, in the user's cache.

    Returns:
        The folder that was written.

    Raises:
        AlignmentError: ``directory`` holds something else.
        DataFileError: It cannot be written; nothing is left behind.
    """
    if directory is None:
        folder = alignment_folders(calibrator)[0] / alignment.fingerprint
    else:
        folder = Path(directory).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        known = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
        if not known <= {"alignment.json", "alignment.safetensors"}:
            raise AlignmentError(
                f"{folder} exists and is no alignment, so it is not replaced: give a new folder or "
                "an empty one"
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
    tensors = {name: getattr(alignment, name).contiguous() for name in _TENSORS}
    try:
        with replacing_folder(folder) as new:
            save_file(tensors, new / "alignment.safetensors")
            text = json.dumps(values, indent=2, ensure_ascii=False)
            (new / "alignment.json").write_text(text + "\n", encoding="utf-8")
            # safetensors gives its files to their owner only.
            mode = (new / "alignment.json").stat().st_mode
            (new / "alignment.safetensors").chmod(mode)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataFileError(
            f"{folder} cannot be written: {reason}. What was there before is unchanged; make room "
            "or give another folder with --out"
        ) from error
    return folder


def load_alignment(directory: str | os.PathLike[str]) -> Alignment:
    """An alignment from its folder, checked.

    Raises:
        AlignmentError: The folder holds none, half of one, a damaged one or one of another
            version.
    """
    folder = Path(directory).expanduser()
    path, tensors_file = folder / "alignment.json", folder / "alignment.safetensors"
    for file in (path, tensors_file):
        if not file.is_file():
            raise AlignmentError(
                f"{file} is missing, so {folder} holds no alignment or half of one. {_MEND}"
            )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise AlignmentError(
                f"{path}: format_version is {version!r}, and this version of fusion-detox reads "
                f"{FORMAT_VERSION}. {_MEND}"
            )
        config = AlignmentConfig().replace(**values.pop("config"))
        with safe_open(tensors_file, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        found = Alignment(
            config=config,
            report=dict(values["report"]),
            fingerprint=str(values["fingerprint"]),
            calibrator_ids=tuple(map(int, values["calibrator_ids"])),
            target_ids=tuple(map(int, values["target_ids"])),
            vocabularies=(str(values["vocabularies"][0]), str(values["vocabularies"][1])),
            **tensors,
        )
    except AlignmentError:
        raise
    except (SafetensorError, OSError) as error:
        raise AlignmentError(f"{folder} is damaged: {first_line(error)}. {_MEND}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ConfigError) as error:
        raise AlignmentError(f"{path} is damaged: {first_line(error)}. {_MEND}") from error
    _check(folder, found)
    return found


def find_alignment(
    calibrator: Calibrator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Alignment:
    """The saved alignment of a calibrator with a target; of two, that with output embeddings.

    Raises:
        AlignmentError: There is none, or none of these two as they are now.
    """
    refused: list[str] = []
    found: list[Alignment] = []
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
    seen = f" (looked at {'; '.join(refused)})" if refused else ""
    raise AlignmentError(
        f"there is no alignment of the calibrator {calibrator.name or 'given'} with {name}: make "
        f"one with `fusion-detox align --calibrator CALIBRATOR --target MODEL`, or with "
        f"fusion_detox.align() and pass it as alignment={seen}"
    )


def describe_alignments(calibrator: Calibrator) -> list[dict[str, Any]]:
    """What is saved, JSON-ready; a damaged one has an ``"error"`` instead of a report."""
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


def _check(folder: Path, found: Alignment) -> None:
    matrix, own, target = found.matrix, found.calibrator_rows, found.target_rows
    fits = (
        matrix.dim() == own.dim() == target.dim() == 2
        and matrix.shape == (own.shape[1], target.shape[1])
        and len(own) == len(found.calibrator_ids)
        and len(target) == len(found.target_ids)
        and all(tensor.dtype == torch.float32 for tensor in (matrix, own, target))
    )
    if not fits:
        raise AlignmentError(
            f"{folder}: the tensors of alignment.safetensors do not fit together or to "
            f"alignment.json (the matrix has the shape {list(matrix.shape)}, the sampled rows "
            f"{list(own.shape)} and {list(target.shape)}); files of two alignments are mixed. "
            f"{_MEND}"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (matrix, own, target)):
        raise AlignmentError(f"{folder} holds values that are not finite numbers. {_MEND}")
