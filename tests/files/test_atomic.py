"""Files and folders are either complete or unchanged, whenever the process is killed."""

import os
import runpy
import threading
from pathlib import Path

import pytest

from fusion_detox.files import atomic
from fusion_detox.files.atomic import (
    recover,
    recover_entries,
    replacing_folder,
    write_whole,
)


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("part", ["pathlib.Path.write_bytes", "os.replace"])
def test_a_file_is_complete_or_unchanged(tmp_path, monkeypatch, part):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def broken(target, *rest):
        if part.endswith("write_bytes"):
            target.touch()
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(part, broken)
        with pytest.raises(OSError, match="no space"):
            write_whole(path, b"after")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"before")]
    write_whole(path, b"after")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"after")]


def interrupted(folder):
    with replacing_folder(folder) as new:
        (new / "file").write_text("new")
        raise KeyboardInterrupt


def test_a_new_folder_and_its_parents_are_created(tmp_path):
    with replacing_folder(tmp_path / "a" / "b") as new:
        (new / "file").write_text("new")
        assert not (tmp_path / "a" / "b").exists()
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/file": "new"}


def test_a_failed_folder_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "a" / "b")
    assert tree(tmp_path) == {}


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    (folder / "notes").write_text("mine")
    return folder


def test_the_old_folder_is_replaced(old, tmp_path):
    with replacing_folder(old) as new:
        (new / "file").write_text("new")
    assert tree(tmp_path) == {"folder": None, "folder/file": "new"}


def test_chosen_entries_of_the_old_folder_are_kept(old, tmp_path):
    with replacing_folder(old, keep=lambda name: name == "notes") as new:
        (new / "file").write_text("new")
    assert tree(tmp_path) == {"folder": None, "folder/file": "new", "folder/notes": "mine"}


def test_the_old_folder_survives_a_failure(old, tmp_path):
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted(old)
    assert tree(tmp_path) == before


def test_the_old_folder_survives_a_failed_move(old, tmp_path, monkeypatch):
    before, rename = tree(tmp_path), os.rename

    def broken(source, target):
        if target == old and "new" in source.parts:
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="no space"), replacing_folder(old):
        pass
    assert tree(tmp_path) == before


# --- kills

killed_at = runpy.run_path(str(Path(__file__).parents[1] / "killed.py"))["killed_at"]
pytest_fork = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def replace(folder):
    with replacing_folder(folder, keep=lambda name: name == "notes") as new:
        (new / "file").write_text("new")


@pytest_fork
@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_survives_a_kill_at_any_moment(tmp_path, monkeypatch, in_one_step):
    """After each kill, a reader finds the old or the new folder; the next writer cleans up."""
    if not in_one_step:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    seen, number, killed = set(), 0, True
    while killed:
        top = tmp_path / str(number)
        (top / "folder" / "notes").mkdir(parents=True)
        (top / "folder" / "notes" / "mine").write_text("mine")
        (top / "folder" / "file").write_text("old")
        killed = killed_at(number, lambda folder=top / "folder": replace(folder))
        if not in_one_step:
            recover(top / "folder")
        found = tree(top / "folder")
        assert found in (
            {"file": "old", "notes": None, "notes/mine": "mine"},
            {"file": "new", "notes": None, "notes/mine": "mine"},
        )
        seen.add(found["file"])
        replace(top / "folder")
        assert tree(top) == {
            "folder": None, "folder/file": "new", "folder/notes": None, "folder/notes/mine": "mine",
        }  # fmt: skip
        number += 1
    assert seen == {"old", "new"}
    assert number > 12


@pytest_fork
def test_a_file_survives_a_kill_at_any_moment(tmp_path):
    path, seen, number, killed = tmp_path / "file", set(), 0, True
    while killed:
        path.write_text("old")
        killed = killed_at(number, lambda: write_whole(path, b"new"))
        seen.add(path.read_text())
        write_whole(path, b"next")
        assert tree(tmp_path) == {"file": "next"}
        number += 1
    assert seen == {"old", "new"}
    assert number > 4


@pytest_fork
def test_a_reader_removes_what_a_killed_writer_left(old, tmp_path):
    before = tree(tmp_path)
    for number in range(20):
        killed_at(number, lambda: interrupted(old))
        recover(old)
        assert tree(tmp_path) == before


@pytest_fork
def test_what_is_left_beside_a_finished_file_can_be_removed(tmp_path):
    """The kill comes after the move, so nothing has to be written again."""
    number = 0
    while killed_at(number, lambda: write_whole(tmp_path / "file", b"new")):
        recover_entries(tmp_path)
        assert set(os.listdir(tmp_path)) <= {"file"}
        number += 1
    recover_entries(tmp_path / "missing")


def test_writers_of_one_folder_wait_for_each_other(tmp_path):
    folder, inside, problems = tmp_path / "folder", [], []

    def write(number):
        for _ in range(20):
            with replacing_folder(folder) as new:
                inside.append(number)
                (new / "file").write_text("x")
                if len(inside) != 1:
                    problems.append(list(inside))
                inside.remove(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert tree(tmp_path) == {"folder": None, "folder/file": "x"}


def test_a_folder_cannot_be_inside_a_file(tmp_path):
    (tmp_path / "file").write_text("text")
    with (
        pytest.raises(NotADirectoryError, match="file is not a folder"),
        replacing_folder(tmp_path / "file" / "folder"),
    ):
        pass
    assert tree(tmp_path) == {"file": "text"}
