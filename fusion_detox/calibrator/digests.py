"""SHA-256 of everything in a calibrator's folder that decides its numbers.

The file ``calibrator.json`` holds them::

    "digests": {"files": {"clean/config.json": …, "clean/model.safetensors": …, …}, "settings": …}

Each file's digest is bound to its path, so two files that changed places do not match. The digest
of the settings is that of all other values in ``calibrator.json``, the files' digests included.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusion_detox.errors import CalibratorError, DataFileError
from fusion_detox.files.untrusted import open_regular

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),  # older versions of transformers write these
)
_PIECE = 1 << 20
_THREADS = 4


def file_digests(folder: Path, parts: Iterable[str]) -> dict[str, str]:
    """The digest of each file that decides the numbers, by its path within the folder.

    Args:
        folder: A calibrator's folder.
        parts: The subfolders of its models.

    Raises:
        DataFileError: A file cannot be read.
    """
    paths = [folder / name for name in TOKENIZER_FILES]
    for part in sorted(parts):
        found = (folder / part).glob("*")
        # File managers leave hidden files, such as ._config.json.
        kept = (path for path in found if not path.name.startswith("."))
        paths += sorted(path for path in kept if path.suffix in (".json", ".safetensors"))
    paths = [path for path in paths if path.exists()]
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib releases the interpreter's lock
        digests = list(pool.map(_digest, paths))
    names = [path.relative_to(folder).as_posix() for path in paths]
    return dict(zip(names, digests, strict=True))


def settings_digest(values: Mapping[str, Any]) -> str:
    """The digest of the values of ``calibrator.json``, whatever their order and spacing."""
    sealed = dict(values.get("digests", {}))
    sealed.pop("settings", None)
    text = json.dumps({**values, "digests": sealed}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_digests(folder: Path, sealed: Mapping[str, str], parts: Iterable[str]) -> int:
    """Refuse a folder in which a file is not what it was when the digests were written.

    Returns:
        The number of files that were read.

    Raises:
        CalibratorError: Files are missing, changed, changed places, or were added.
        DataFileError: A file cannot be read.
    """
    found = file_digests(folder, parts)
    owners = {digest: name for name, digest in sealed.items()}
    faults = [f"{name} is missing" for name in sealed if name not in found]
    for name, digest in found.items():
        if name not in sealed:
            faults.append(f"{name} was added")
        elif digest != sealed[name]:
            owner = owners.get(digest)
            place = "was changed or damaged" if owner is None else f"holds the content of {owner}"
            faults.append(f"{name} {place}")
    if faults:
        raise CalibratorError(
            f"{folder} does not match the digests in its calibrator.json: {'; '.join(faults)}. "
            f"{reseal_advice(folder)}"
        )
    return len(found)


def reseal_advice(folder: Path) -> str:
    """What to do about a folder that does not match its digests."""
    return (
        f"Copy the whole folder again from its source. If you changed it on purpose, accept the "
        f"change with `{reseal_command(folder)}`."
    )


def reseal_command(folder: Path) -> str:
    """The command that checks a folder and writes its digests."""
    return f"fusion-detox doctor {shlex.quote(str(folder))} --write-digests"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()
