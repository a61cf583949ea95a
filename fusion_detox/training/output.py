"""The output of a training run: checked before the work starts, and never trained twice."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from safetensors import SafetensorError

from fusion_detox.errors import DataFileError, FusionDetoxError, TrainingError
from fusion_detox.files.atomic import recover
from fusion_detox.files.loading_errors import first_line
from fusion_detox.files.locks import claims
from fusion_detox.files.untrusted import read_json

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

MARKER = "run.json"
"""File of a work folder that identifies its run."""

_DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EIO")
    if hasattr(errno, name)
}
# torch and tokenizers raise RuntimeError and Exception, and name the cause only in the message.
_WRITING = re.compile(
    r"PytorchStreamWriter|PyTorchFileWriter|unexpected pos|os error \d+|No space left|"
    r"File too large|Read-only file system|Permission denied"
)


def writes_output(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that trains what the folder in its parameter ``output`` will hold.

    One process at a time runs it for the same folder, which must be writable. Errors of writing
    become ours.
    """
    alone, signature = claims("output")(function), inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        output = Path(signature.bind(*args, **kwargs).arguments["output"]).expanduser()
        with _explained_writes(output):
            return alone(*args, **kwargs)

    return wrapper


def work_folder(output: Path) -> Path:
    """The folder of a run's unfinished work."""
    return output.with_name(output.name + ".training")


@contextlib.contextmanager
def _explained_writes(output: Path) -> Iterator[None]:
    """Refuse a path that libraries cannot write to, and explain why a file could not be."""
    try:
        str(output.absolute()).encode()
    except UnicodeEncodeError as error:
        raise TrainingError(
            f"the path {str(output.absolute())!r} is not valid UTF-8, and models cannot be saved "
            "there: choose another output, or rename its folder"
        ) from error
    try:
        yield
    except FusionDetoxError:
        raise
    except Exception as error:
        if not _is_about_writing(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataFileError(
            f"{output} or {work_folder(output)} cannot be written: {reason}. Finished work is "
            "kept; free some space or give write access, then rerun to resume."
        ) from error


def _is_about_writing(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK
    named = isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception
    return named and bool(_WRITING.search(str(error)))


def finished_record(output: Path) -> dict[str, Any]:
    """The record of a finished training run in ``output``; empty if there is none."""
    recover(output)
    try:
        record = read_json(output / "training.json", finite=False)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and "fingerprint" in record else {}


def check_replaceable(output: Path, finished: Mapping[str, Any], overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be replaced or perhaps nothing is left to do.

    Raises:
        TrainingError: It is neither.
    """
    if output.exists() and not overwrite and not finished:
        raise exists_already(output)


def check_same(output: Path, finished: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse a finished output, unless it is the result of this same request.

    Args:
        output: The folder.
        finished: Its record.
        facts: What the request would record; it is compared with ``finished``.

    Raises:
        TrainingError: The record differs.
    """
    wanted = json.loads(json.dumps(facts, default=str))
    if any(finished.get(name) != value for name, value in wanted.items()):
        raise exists_already(output)
    logger.warning("%s is already finished; --overwrite trains it again", output)


def exists_already(output: Path) -> TrainingError:
    """The error for an output that exists."""
    return TrainingError(
        f"{output} already exists: choose another folder, or replace this one with --overwrite"
    )


def discard(work: Path) -> None:
    """Delete a work folder. If that is interrupted, the rest is not mistaken for unfinished work.

    Raises:
        OSError: It cannot be deleted.
    """
    (work / MARKER).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
