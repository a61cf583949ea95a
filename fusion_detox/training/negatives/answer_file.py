"""Every answer of a model on disk as soon as it is there; a later run asks for the others only."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.atomic import write_whole
from fusion_detox.files.differences import differences
from fusion_detox.files.journal import append_row
from fusion_detox.training.negatives.config import SIDES
from fusion_detox.training.negatives.requests import FILTERED, LENGTH, STOP, Answer, Keep, Request

_START = b'{"sentence": '


class AnswerFolder:
    """The folder ``OUT.work`` beside an output: settings, sentences, and raw answers.

    ``answers.jsonl`` holds a row a request: ``{"sentence", "side", "sample", "answer", "finish",
    "tokens"}``, or ``"failure"`` with its reason in place of the answer. A failed request is asked
    again by the next run; its later row counts. ``run.json`` holds what decides an answer, the
    filters and the sentences.

    Args:
        out: The file of pairs; its folder must exist.

    Raises:
        DataFileError: The folder of ``out`` does not exist, or ``out`` is a folder itself.
    """

    def __init__(self, out: Path) -> None:
        if out.is_dir():
            raise DataFileError(f"{out} is a folder; name a file for the pairs")
        if not out.parent.is_dir():
            raise DataFileError(f"the folder {out.parent} of the output does not exist; create it")
        self.out = out
        self.folder = out.with_name(out.name + ".work")
        self.answers_path = self.folder / "answers.jsonl"
        self._run_path = self.folder / "run.json"
        self._rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._size = 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out.

        Raises:
            DataFileError: Another process writes the same output, or the folder cannot be made.
        """
        lock = FileLock(self.folder / "lock", timeout=0)
        try:
            self.folder.mkdir(exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise DataFileError(
                f"another process is writing {self.out}; wait for it, or name another output"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise DataFileError(f"cannot write to {self.folder}: {error}") from error
        try:
            yield
        finally:
            lock.release()

    def settings(self) -> dict[str, Any]:
        """What ``run.json`` holds.

        Raises:
            DataFileError: It is not there: nothing was asked for this output.
            DataError: It is damaged.
        """
        try:
            found = json.loads(self._run_path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataFileError(
                f"there are no answers for {self.out}: {self._run_path} cannot be read "
                f"({error.strerror}); ask for them first, without --refilter"
            ) from error
        except ValueError as error:
            raise self._damaged(self._run_path, str(error)) from error
        if not isinstance(found, dict) or not {"asking", "sentences"} <= set(found):
            raise self._damaged(self._run_path, "it lacks its fields")
        return found

    def check(self, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Reads the answers that are there, if they can be gone on with; nothing is written.

        Args:
            settings: What is handed to ``begin`` later; its ``asking`` must be what it was.
            overwrite: The answers that are there will be thrown away.

        Raises:
            DataError: The answers were asked for with other settings, or a file is damaged.
            DataFileError: A file cannot be read, or the output was not made here.
        """
        self._rows, self._size = {}, 0
        if overwrite:
            return
        if self._run_path.exists():
            before, now = self.settings()["asking"], _plain(settings)["asking"]
            if before != now:
                changes = "; ".join(
                    f"{name} was {json.dumps(old)}, now {json.dumps(new)}"
                    for name, old, new in differences(before, now)
                )
                raise DataError(
                    f"the answers in {self.folder} were asked for with other settings "
                    f"({changes}); name another output, or --overwrite to throw them away"
                )
            self.read()
        elif self.out.exists() or self.answers_path.exists():
            raise DataFileError(
                f"{self.out} is there, but not what this command keeps beside it; name another "
                "output, or --overwrite to replace it"
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Makes the folder ready for answers, after ``check``: cuts off what a kill tore.

        Raises:
            DataFileError: The folder cannot be written.
        """
        try:
            if self.answers_path.exists():
                os.truncate(self.answers_path, self._size)
            content = json.dumps(_plain(settings), indent=1) + "\n"
            write_whole(self._run_path, content.encode("ascii"))
        except OSError as error:
            raise DataFileError(f"cannot write to {self.folder}: {error.strerror}") from error

    def read(self) -> None:
        """Reads the answers; a last line that a kill tore is passed over.

        Raises:
            DataError: A line is no answer.
            DataFileError: The file cannot be read.
        """
        self._rows, self._size = {}, 0
        if not self.answers_path.exists():
            return
        try:
            content = self.answers_path.read_bytes()
        except OSError as error:
            raise DataFileError(f"{self.answers_path} cannot be read: {error.strerror}") from error
        whole, newline, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            self._add(line, number)
        if torn and not (torn.startswith(_START) or _START.startswith(torn)):
            raise self._damaged(self.answers_path, "its last line is no answer")
        self._size = len(whole) + len(newline)

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests without an answer: first those never asked, then those that failed.

        A service that rejects some for good would else be taken for one that rejects all.
        """
        open_ = [one for one in requests if "answer" not in self._rows.get(one.key, {})]
        return sorted(open_, key=lambda one: one.key in self._rows)

    def answers(self, requests: Sequence[Request]) -> list[Answer | None]:
        """What came of each request; ``None`` where it was never asked."""
        return [self._answer(request) for request in requests]

    @contextlib.contextmanager
    def appending(self) -> Iterator[Keep]:
        """Gives a function that puts an answer on the disk before it returns.

        Raises:
            DataFileError: The device is full or broken; answers written before are kept.
        """
        try:
            stream = self.answers_path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        with stream:

            def keep(answer: Answer) -> None:
                row = _row(answer)
                try:
                    append_row(stream, row, errors="surrogatepass")
                    os.fsync(stream.fileno())
                except OSError as error:
                    raise self._unwritable(error) from error
                self._rows[answer.request.key] = row

            yield keep

    def _add(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line.decode("utf-8", "surrogatepass"))
            key = (row["sentence"], row["side"], row["sample"])
            usable = isinstance(row.get("answer", row.get("failure")), str) and key[1] in SIDES
            if usable and isinstance(key[0], str) and isinstance(key[2], int):
                if "answer" in row and row["finish"] not in (STOP, LENGTH, FILTERED):
                    raise ValueError
                self._rows[key] = row
                return
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise self._damaged(self.answers_path, f"line {number} is no answer")

    def _answer(self, request: Request) -> Answer | None:
        row = self._rows.get(request.key)
        if row is None:
            return None
        if "answer" not in row:
            return Answer(request, failure=row["failure"])
        counts = row.get("tokens") or [None, None]
        return Answer(request, row["answer"], row["finish"], counts[0], counts[1])

    def _unwritable(self, error: OSError) -> DataFileError:
        return DataFileError(
            f"cannot write to {self.answers_path}: {error.strerror}; the answers before are kept, "
            "and the same command goes on from there once that is mended"
        )

    def _damaged(self, path: Path, reason: str) -> DataError:
        return DataError(
            f"{path} is damaged: {reason}; mend it, or --overwrite to throw all answers away"
        )


def _plain(settings: Mapping[str, Any]) -> Any:
    """As it will be read back, with lists for tuples."""
    return json.loads(json.dumps(settings))


def _row(answer: Answer) -> dict[str, Any]:
    request = answer.request
    row: dict[str, Any] = {
        "sentence": request.sentence,
        "side": request.side,
        "sample": request.sample,
    }
    if answer.failure:
        return {**row, "failure": answer.failure}
    tokens = [answer.prompt_tokens, answer.completion_tokens]
    return {**row, "answer": answer.text, "finish": answer.finish, "tokens": tokens}
