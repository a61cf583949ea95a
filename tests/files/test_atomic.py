"""Files and folders are either complete or unchanged."""

import os

import pytest

from fusion_detox.files.atomic import replacing_folder, write_whole


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
        if os.path.basename(source) == "new":
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="no space"), replacing_folder(old):
        pass
    assert tree(tmp_path) == before


def test_a_folder_cannot_be_inside_a_file(tmp_path):
    (tmp_path / "file").write_text("text")
    with (
        pytest.raises(NotADirectoryError, match="file is not a folder"),
        replacing_folder(tmp_path / "file" / "folder"),
    ):
        pass
    assert tree(tmp_path) == {"file": "text"}
