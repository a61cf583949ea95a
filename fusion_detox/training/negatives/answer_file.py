"""Stores every answer on disk as soon as it arrives, so that a later run requests only the rest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.atomic import write_whole
from fusion_detox.files.differences import differences
from fusion_detox.files.journal import DamagedLineError, Journal
from fusion_detox.files.locks import sole_process
from fusion_detox.training.negatives.config import SIDES
from fusion_detox.training.negatives.requests import FILTERED, LENGTH, STOP, Answer, Keep, Request


class AnswerFolder:
    """The folder ``OUT.work`` beside an output: settings, sentences, and raw answers.

    ``answers.jsonl`` contains one row per request: ``{"sentence", "side", "sample", "answer",
    "finish", "tokens"}``, or ``"failure"`` with the reason instead of the answer. The next run
    sends a failed request again; its later row replaces the earlier one. ``run.json`` contains the
    sentences and the settings that influence an answer.

    Args:
        out: The file of pairs; its folder must exist.

    Raises:
        DataFileError: The folder of ``out`` does not exist, or ``out`` is itself a folder.
    """

    def __init__(self, out: Path) -> None:
        if out.is_dir():
            raise DataFileError(f"{out} is a folder; specify a file for the pairs")
        if not out.parent.is_dir():
            raise DataFileError(f"the output's folder {out.parent} does not exist; create it")
        self.out = out
        self.folder = out.with_name(out.name + ".work")
        self.answers_path = self.folder / "answers.jsonl"
        self._run_path = self.folder / "run.json"
        self._journal = Journal(self.answers_path, "sentence")
        self._rows: dict[tuple[str, str, int], dict[str, Any]] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against other processes.

        Raises:
            DataFileError: Another process is writing the output, or the folder cannot be created.
        """
        with _writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        with sole_process(self.folder / "lock", str(self.out)):
            yield

    def settings(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            DataFileError: It cannot be read, so there are no answers for this output.
            DataError: It is damaged.
        """
        try:
            found = json.loads(self._run_path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataFileError(
                f"no answers were found for {self.out}, because {self._run_path} cannot be read "
                f"({error.strerror}); request them first, without --refilter"
            ) from error
        except ValueError as error:
            raise self._damaged(self._run_path, str(error)) from error
        if not isinstance(found, dict) or not {"asking", "sentences"} <= set(found):
            raise self._damaged(self._run_path, "fields are missing")
        return found

    def check(self, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Reads the existing answers if a run with these settings can resume; writes nothing.

        Args:
            settings: The settings for ``begin``; their ``"asking"`` must equal the stored one.
            overwrite: Ignore the existing answers, since ``begin`` will delete them.

        Raises:
            DataError: The answers were requested with other settings, or a file is damaged.
            DataFileError: A file cannot be read, or this command did not write the output.
        """
        if overwrite:
            self._forget()
        elif self._run_path.exists():
            before, now = self.settings()["asking"], _plain(settings)["asking"]
            if before != now:
                changes = "; ".join(
                    f"{name} was {json.dumps(old)}, now {json.dumps(new)}"
                    for name, old, new in differences(before, now)
                )
                raise DataError(
                    f"the answers in {self.folder} were requested with other settings "
                    f"({changes}); choose another output, or use --overwrite to delete them"
                )
            self.read()
        elif self.out.exists() or self.answers_path.exists():
            raise DataFileError(
                f"{self.out} exists, but {self._run_path}, which this command writes, does not; "
                "choose another output, or use --overwrite to replace it"
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Prepares the folder for answers after ``check``; cuts off a torn last line.

        Raises:
            DataFileError: The folder cannot be written.
        """
        with _writing(self.folder):
            self._journal.cut_torn_line()
            content = json.dumps(_plain(settings), indent=1) + "\n"
            write_whole(self._run_path, content.encode("ascii"))

    def read(self) -> None:
        """Reads the answers; ignores a torn last line.

        Raises:
            DataError: A line is not an answer.
            DataFileError: The file cannot be read.
        """
        self._forget()
        try:
            for number, line in self._journal.read():
                row = _parse(line, number)
                self._rows[row["sentence"], row["side"], row["sample"]] = row
        except DamagedLineError as error:
            reason = f"line {error.number} is not an answer"
            raise self._damaged(self.answers_path, reason) from error
        except OSError as error:
            raise DataFileError(f"cannot read {self.answers_path}: {error.strerror}") from error

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests without an answer: first those never sent, then those that failed.

        In any other order, a service that always rejects some would seem to reject all.
        """
        missing = [one for one in requests if "answer" not in self._rows.get(one.key, {})]
        return sorted(missing, key=lambda one: one.key in self._rows)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """The stored answers and failures of some requests, in the order of the requests."""
        return [
            _answer(request, self._rows[request.key])
            for request in requests
            if request.key in self._rows
        ]

    @contextlib.contextmanager
    def appending(self) -> Iterator[Keep]:
        """Yields a function that writes an answer to disk before it returns.

        Raises:
            DataFileError: The device is full or broken; answers written earlier are kept.
        """
        with contextlib.ExitStack() as stack:
            with _writing(self.answers_path):
                append = stack.enter_context(self._journal.open(sync=True))

            def keep(answer: Answer) -> None:
                row = _row(answer)
                with _writing(self.answers_path):
                    append(row)
                self._rows[answer.request.key] = row

            yield keep

    def _forget(self) -> None:
        self._journal.forget()
        self._rows = {}

    def _damaged(self, path: Path, reason: str) -> DataError:
        return DataError(
            f"{path} is damaged: {reason}; repair it, or use --overwrite to delete all answers"
        )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataFileError(
            f"cannot write to {path}: {error.strerror}; earlier answers are kept; fix this, then "
            "rerun to resume"
        ) from error


def _plain(settings: Mapping[str, Any]) -> Any:
    """The settings as they will be read back, with lists instead of tuples."""
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


def _parse(line: bytes, number: int) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line.decode("utf-8", "surrogatepass"))
        values = row["sentence"], row["sample"], row.get("answer", row.get("failure"))
        typed = all(map(isinstance, values, (str, int, str)))
        ended = "answer" not in row or row["finish"] in (STOP, LENGTH, FILTERED)
        if typed and ended and row["side"] in SIDES:
            return row
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DamagedLineError(number)


def _answer(request: Request, row: Mapping[str, Any]) -> Answer:
    if "answer" not in row:
        return Answer(request, failure=row["failure"])
    prompt_tokens, completion_tokens = row.get("tokens") or [None, None]
    return Answer(request, row["answer"], row["finish"], prompt_tokens, completion_tokens)
