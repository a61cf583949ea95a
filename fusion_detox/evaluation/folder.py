"""The folder of a run: what was asked, every continuation, every measurement, the report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.evaluation.prompts.prompt_sets import Prompt
from fusion_detox.files.atomic import write_whole
from fusion_detox.files.differences import differences

FORMAT = 1
_LOCK = ".lock"
_PARTS = ("settings", "samples", "measures", "costs", "scores")
_FILES = ("run.json", "asked.json", "prompts.jsonl", "results.json", "report.html", "report.png")


class RunFolder:
    """Reads and writes a run's files; each JSON file is written whole or not at all.

    ``run.json`` holds what every continuation of the run has in common (target, prompts, sampling,
    seeds) and may never change; settings and scorers may be added.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextlib.contextmanager
    def claimed(cls, path: Path) -> Iterator[None]:
        """Makes the folder if need be, and keeps other commands out of it meanwhile.

        Raises:
            DataError: The folder holds something other than a run.
            DataFileError: It cannot be written, or another command is working in it.
        """
        # A start that was cut short may have left any part of these.
        ours = not path.exists() or (path / "run.json").exists()
        known = {_LOCK, *_PARTS, *_FILES}
        if not ours and (not path.is_dir() or any(e.name not in known for e in path.iterdir())):
            raise DataError(
                f"{path} exists and is no run of `fusion-detox evaluate`, so nothing is written "
                "there; choose a new folder"
            )
        lock = FileLock(path / _LOCK, timeout=0)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise DataFileError(
                f"another command is working on the run in {path}; wait for it, or choose another "
                "folder"
            ) from error
        except OSError as error:
            raise DataFileError(f"cannot write to {path}: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    @classmethod
    def create(cls, path: Path, fixed: Mapping[str, Any], prompts: Sequence[Prompt]) -> RunFolder:
        """The folder for a run, new or gone on with.

        Args:
            path: Claimed.
            fixed: What all continuations of the run have in common.
            prompts: All prompts, in order.

        Raises:
            DataError: The folder holds another run.
            DataFileError: It cannot be written.
        """
        folder = cls(path)
        values = json.loads(json.dumps({"format": FORMAT, **fixed}))
        if (path / "run.json").exists():
            before = folder.read("run.json")
            if before != values:
                raise DataError(
                    f"{path} holds a run with {describe_difference(before, values)}; choose "
                    "another folder, or --overwrite to start anew"
                )
        try:
            for part in _PARTS:
                (path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataFileError(f"cannot write to {path}: {error.strerror}") from error
        lines = [
            json.dumps(dataclasses.asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts
        ]
        folder.write_text("prompts.jsonl", "".join(lines))
        folder.write("run.json", values)
        return folder

    def forget(self) -> None:
        """Removes what a run wrote, and nothing else."""
        if not (self.path / "run.json").is_file():
            return
        for part in _PARTS:
            shutil.rmtree(self.path / part, ignore_errors=True)
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run that was begun.

        Raises:
            DataFileError: There is no run.
            DataError: ``run.json`` is damaged or of another version.
        """
        if not (path / "run.json").is_file():
            raise DataFileError(
                f"{path} holds no run: there is no run.json; give a folder that "
                "`fusion-detox evaluate` wrote"
            )
        folder = cls(path)
        version = folder.read("run.json").get("format")
        if version != FORMAT:
            raise DataError(
                f"{path} was written in format {version!r}, and this version reads {FORMAT}; run "
                "the evaluation again"
            )
        return folder

    def prompts(self) -> list[Prompt]:
        """The prompts of the run, in order."""
        text = self._text("prompts.jsonl")
        try:
            return [Prompt(**json.loads(line)) for line in text.split("\n") if line]
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.path / 'prompts.jsonl'} is damaged: {error}") from error

    def read(self, name: str) -> dict[str, Any]:
        """An object of a JSON file of the run.

        Raises:
            DataFileError: It is not there.
            DataError: It is damaged.
        """
        try:
            values = json.loads(self._text(name))
        except ValueError as error:
            remedy = (
                "start the run anew with --overwrite"
                if name in ("run.json", "asked.json")
                else "delete it, and the same command makes it again"
            )
            raise DataError(f"{self.path / name} is damaged ({error}); {remedy}") from error
        if not isinstance(values, dict):
            raise DataError(f"{self.path / name} holds no object; delete it")
        return values

    def read_if_there(self, name: str) -> dict[str, Any] | None:
        """Like :meth:`read`; ``None`` where the file does not exist."""
        return self.read(name) if (self.path / name).is_file() else None

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a JSON file whole or not at all."""
        self.write_text(
            name, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file whole or not at all.

        Raises:
            DataFileError: The disk is full or the folder cannot be written.
        """
        path = self.path / name
        try:
            write_whole(path, text.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise DataFileError(
                f"cannot write {path}: {error.strerror}; what was there before is kept"
            ) from error

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8", errors="surrogatepass")
        except OSError as error:
            raise DataFileError(f"cannot read {self.path / name}: {error.strerror}") from error


def describe_difference(before: Any, now: Any) -> str:
    """What differs between two JSON values: ``a.b 1 instead of 2``; at most three differences."""
    found = [
        f"{name} {_short(one)} instead of {_short(other)}"
        for name, one, other in differences(before, now)
    ]
    more = f" and {len(found) - 3} more differences" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
