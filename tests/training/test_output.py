"""What happens to the output of a training run: kills, a full disk, odd paths, two processes."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from fusion_detox import Calibrator
from fusion_detox.config import FusionConfig
from fusion_detox.errors import DataError, DataFileError, TrainingError
from fusion_detox.files.locks import claimed
from fusion_detox.training import TrainingConfig, train_calibrator
from fusion_detox.training.output import discard, writes_output

SMALL: dict[str, Any] = {
    "base_steps": 2, "fork_steps": 2, "batch_size": 2, "context_length": 16,
    "vocabulary_size": 300, "hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2,
    "warmup_steps": 1, "held_out": 0.2, "device": "cpu", "save_dtype": "float32",
}  # fmt: skip

SENTENCE = "the weather was fine so we walked to the old river and had lunch there"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "posts.jsonl"
    words = SENTENCE.split()
    rows = [
        {"text": " ".join(words[i % 7 : i % 7 + 6] * 3) + f" {i}", "toxic": i % 3 == 0}
        for i in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def train(output: Path, corpus: Path, **more: Any) -> Calibrator:
    config = TrainingConfig(**{**SMALL, **more.pop("settings", {})})
    return train_calibrator(
        output, general=[corpus], clean_where=["toxic=false"], config=config, show_progress=False,
        **more,
    )  # fmt: skip


def test_a_kill_after_the_save_ends_in_success(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def killed(work: Path) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr("fusion_detox.training.pipeline.discard", killed)
        with pytest.raises(SystemExit):
            train(tmp_path / "toy", corpus)
    assert (tmp_path / "toy.training").exists()
    content = {p: p.read_bytes() for p in (tmp_path / "toy").rglob("*") if p.is_file()}
    made = train(tmp_path / "toy", corpus)
    assert "toy is already finished" in caplog.text
    assert os.listdir(tmp_path) == ["toy"]
    assert {p: p.read_bytes() for p in (tmp_path / "toy").rglob("*") if p.is_file()} == content
    assert made.folder == tmp_path / "toy"
    # Another request is another calibrator.
    others: list[dict[str, Any]] = [
        {"settings": {"seed": 5}}, {"settings": {"save_dtype": "bfloat16"}}, {"name": "other"},
        {"notes": {"language": "en"}}, {"fusion": FusionConfig(strength=0.3)},
    ]  # fmt: skip
    for other in others:
        with pytest.raises(TrainingError, match="already exists"):
            train(tmp_path / "toy", corpus, **other)


def test_a_work_folder_without_its_marker_is_new_or_needs_overwrite(
    corpus: Path, tmp_path: Path
) -> None:
    """The marker is written first and deleted first."""
    work = tmp_path / "toy.training"
    work.mkdir()
    (work / ".run.json.writing").write_text("1")  # of a write that was killed
    train(tmp_path / "toy", corpus)
    (tmp_path / "toy").rename(tmp_path / "moved")
    (work / "base").mkdir(parents=True)
    with pytest.raises(TrainingError, match="holds unfinished training with other text"):
        train(tmp_path / "toy", corpus)
    (work / "run.json").write_text("{}")
    discard(work)
    assert os.listdir(tmp_path) == ["moved"]


def test_a_second_process_is_refused_before_it_reads_anything(corpus: Path, tmp_path: Path) -> None:
    match = rf"another command \(process {os.getpid()}\) is working on .*toy"
    with claimed(tmp_path / "toy"), pytest.raises(DataFileError, match=match):
        train(tmp_path / "toy", tmp_path / "missing")
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataFileError, match=r"posts\.jsonl is not a folder"):
        train(corpus / "toy", tmp_path / "missing")

    def read_only(path: Any, flags: int, *mode: int) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr("fusion_detox.files.locks.os.open", read_only)
    with pytest.raises(DataFileError, match="Read-only file system; choose a writable folder"):
        train(tmp_path / "toy", tmp_path / "missing")


def test_a_path_that_is_not_utf8(corpus: Path, tmp_path: Path) -> None:
    """The output is refused before the work; a source is recorded."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    for output in (odd, odd / "toy"):
        with pytest.raises(TrainingError, match="is not valid UTF-8"):
            train(output, tmp_path / "missing")
    assert os.listdir(tmp_path) == []
    source = odd.with_suffix(".jsonl")
    source.write_bytes(corpus.read_bytes())
    made = train(tmp_path / "toy", source, command=f"train {source}")
    train(tmp_path / "toy", source)  # is finished
    assert Calibrator.from_pretrained(tmp_path / "toy").tokens == made.tokens
    record = json.loads((tmp_path / "toy" / "training.json").read_text())
    assert record["command"] == f"train {tmp_path / 'caf?.jsonl'}"
    assert "caf?" in (tmp_path / "toy" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kibibytes", [1, 4, 16, 40])
def test_a_full_disk_is_explained_and_the_run_resumes(
    corpus: Path, tmp_path: Path, kibibytes: int
) -> None:
    """A limit on the size of files makes some write of the run fail; the next run finishes."""
    child = os.fork()
    if child == 0:
        code = 4
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes << 10, -1))
            train(tmp_path / "toy", corpus)
            code = 3
        except DataFileError as error:
            text = str(error)
            code = 0 if "cannot be written" in text and "rerun to resume" in text else 5
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not (tmp_path / "toy").exists()
    train(tmp_path / "toy", corpus)
    assert os.listdir(tmp_path) == ["toy"]


def failing(error: BaseException) -> Callable[[Path], None]:
    @writes_output
    def work(output: Path) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError("I/O error: No space left on device (os error 28)"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_each_librarys_error_for_a_full_disk(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(DataFileError, match="free some space or give write access"):
        failing(error)(tmp_path / "toy")


@pytest.mark.parametrize(
    "error",
    [
        DataError("our own"), KeyboardInterrupt(), RuntimeError("CUDA error"),
        FileNotFoundError(errno.ENOENT, "no file"), ValueError("No space left"),
    ],
)  # fmt: skip
def test_other_errors_stay_what_they_are(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        failing(error)(tmp_path / "toy")
    assert caught.value is error
