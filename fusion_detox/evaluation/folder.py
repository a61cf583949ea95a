"""The folder of a run: its configuration, continuations, measurements and report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.evaluation.prompts.prompt_sets import Prompt
from fusion_detox.files.atomic import recover_entries, write_whole
from fusion_detox.files.differences import differences
from fusion_detox.files.locks import sole_process

FORMAT = 1
_LOCK = ".lock"
_FIXED, _CONFIG, _PROMPTS = "run.json", "config.json", "prompts.jsonl"
_OLD_CONFIG = "asked.json"  # the name of config.json in earlier versions
_PARTS = ("settings", "samples", "measures", "costs", "scores")
_FILES = (_FIXED, _CONFIG, _OLD_CONFIG, _PROMPTS, "results.json", "report.html", "report.png")


class RunFolder:
    """Reads and writes the files of a run. Each file is written completely or not at all.

    Methods raise ``DataError`` if a file is damaged or the folder holds something else, and
    ``DataFileError`` if a file is missing or cannot be read or written.

    ``run.json`` holds what all continuations share (target, prompts, sampling, seeds) and never
    changes. ``config.json`` holds the variants, scorers and measurement settings of the latest
    call.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextlib.contextmanager
    def claimed(cls, path: Path) -> Iterator[None]:
        """Creates the folder if needed, and locks it against other commands."""
        # An interrupted start may have left some of these files but no run.json.
        ours = not path.exists() or (path / _FIXED).exists()
        if not ours and (not path.is_dir() or not all(_known(e.name) for e in path.iterdir())):
            raise DataError(
                f"{path} exists and is not a run of `fusion-detox evaluate`, so nothing is written "
                "there; choose a new folder"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataFileError(f"cannot write to {path}: {error.strerror}") from error
        with sole_process(path / _LOCK, f"the run in {path}"):
            for folder in (path, *(path / part for part in _PARTS)):
                recover_entries(folder)
            yield

    @classmethod
    def create(cls, path: Path, fixed: Mapping[str, Any], prompts: Sequence[Prompt]) -> RunFolder:
        """Creates the files of a run in a claimed folder, or checks that it holds the same run.

        ``fixed`` is the content of ``run.json``.
        """
        folder = cls(path)
        values = json.loads(json.dumps({"format": FORMAT, **fixed}))
        if (path / _FIXED).exists():
            before = folder.read(_FIXED)
            if before != values:
                raise DataError(
                    f"{path} holds a run with {_describe_differences(before, values)}; choose "
                    "another folder, or start again with --overwrite"
                )
        try:
            for part in _PARTS:
                (path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataFileError(f"cannot write to {path}: {error.strerror}") from error
        lines = [
            json.dumps(dataclasses.asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts
        ]
        folder._write_text(_PROMPTS, "".join(lines))
        folder.write(_FIXED, values)
        return folder

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run that was started before."""
        if not (path / _FIXED).is_file():
            raise DataFileError(
                f"{path} holds no run: {_FIXED} was not found; give a folder that "
                "`fusion-detox evaluate` wrote"
            )
        folder = cls(path)
        version = folder.read(_FIXED).get("format")
        if version != FORMAT:
            raise DataError(
                f"{path} was written in format {version!r}, and this version reads {FORMAT}; run "
                "the evaluation again"
            )
        return folder

    def forget(self) -> None:
        """Deletes the files of a run, and nothing else."""
        if not (self.path / _FIXED).is_file():
            return
        for part in _PARTS:
            shutil.rmtree(self.path / part, ignore_errors=True)
        for name in reversed(_FILES):  # run.json last: without it, nothing is deleted
            (self.path / name).unlink(missing_ok=True)

    def prompts(self) -> list[Prompt]:
        """The prompts of the run, in order."""
        text = self._read_text(_PROMPTS)
        try:
            return [Prompt(**json.loads(line)) for line in text.split("\n") if line]
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{self.path / _PROMPTS} is damaged: {error}; start again with --overwrite"
            ) from error

    def has_config(self) -> bool:
        """Whether a call has written ``config.json`` (``asked.json`` in earlier versions)."""
        return any((self.path / name).is_file() for name in (_CONFIG, _OLD_CONFIG))

    def read_config(self) -> dict[str, Any]:
        """The content of ``config.json``, or of ``asked.json`` in a run from an earlier version."""
        return self.read(_CONFIG if (self.path / _CONFIG).is_file() else _OLD_CONFIG)

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Writes ``config.json``."""
        self.write(_CONFIG, values)
        (self.path / _OLD_CONFIG).unlink(missing_ok=True)

    def read(self, name: str) -> dict[str, Any]:
        """Reads a JSON file of the run."""
        path, text = self.path / name, self._read_text(name)
        remedy = (
            "start the run again with --overwrite"
            if name in (_FIXED, _CONFIG, _OLD_CONFIG)
            else "delete it, then run the same command to create it again"
        )
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); {remedy}") from error
        if not isinstance(values, dict):
            raise DataError(f"{path} is damaged (it is not a JSON object); {remedy}")
        return values

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a JSON file of the run."""
        text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
        self._write_text(name, text + "\n")

    def _read_text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8", errors="surrogatepass")
        except OSError as error:
            raise DataFileError(f"cannot read {self.path / name}: {error.strerror}") from error

    def _write_text(self, name: str, text: str) -> None:
        path = self.path / name
        try:
            write_whole(path, text.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise DataFileError(
                f"cannot write {path}: {error.strerror}; the earlier content is kept"
            ) from error


def _known(name: str) -> bool:
    """Whether an entry of a folder is from a run, or is what a killed write of one left."""
    return name in (_LOCK, *_PARTS, *_FILES) or any(name.startswith(f".{f}.") for f in _FILES)


def _describe_differences(before: Any, now: Any) -> str:
    """The first three differences between two JSON values, as ``a.b 1 instead of 2``."""

    def short(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 60 else text[:59] + "…"

    found = [
        f"{name} {short(old)} instead of {short(new)}"
        for name, old, new in differences(before, now)
    ]
    more = f" and {len(found) - 3} more differences" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more
