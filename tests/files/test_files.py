"""How files are read, written and compared: bytes, JSON Lines, whole files, changed settings."""

import gzip
import io
import json

import pytest

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.atomic import write_whole
from fusion_detox.files.differences import differences
from fusion_detox.files.journal import append_row
from fusion_detox.files.tables import decode_text
from fusion_detox.training.data.corpus import Columns, read_documents


class Unwilling(io.BytesIO):
    """Takes three bytes at a time, as an unbuffered file may."""

    def write(self, data):
        return super().write(bytes(data[:3]))


def test_a_row_is_one_line_however_little_the_stream_takes():
    row = {"text": "a\x85b\u2028c\u2029d\ne é 🙂"}
    stream = Unwilling()
    append_row(stream, row)
    text = stream.getvalue().decode()
    assert text.splitlines() == [text.removesuffix("\n")]
    assert json.loads(text) == row
    assert "é 🙂" in text


def test_lone_surrogates_are_refused_or_kept():
    stream = io.BytesIO()
    with pytest.raises(UnicodeEncodeError):
        append_row(stream, {"text": "\ud83d"})
    assert stream.getvalue() == b""
    append_row(stream, {"text": "\ud83d"}, errors="surrogatepass")
    assert json.loads(stream.getvalue().decode("utf-8", "surrogatepass")) == {"text": "\ud83d"}


@pytest.mark.parametrize("part", ["pathlib.Path.write_bytes", "os.replace"])
def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch, part):
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


def test_differences_are_named_by_their_place():
    before = {"a": {"b": 1, "c": [1, {"d": 2}], "e": [1]}, "same": [1, 2], "gone": 3}
    now = {"a": {"b": 2, "c": [1, {"d": 5}], "e": [1, 2]}, "same": [1, 2], "new": None, "x": 4}
    assert list(differences(before, now)) == [
        ("a.b", 1, 2),
        ("a.c[1].d", 2, 5),
        ("a.e", [1], [1, 2]),
        ("gone", 3, None),
        ("x", None, 4),
    ]
    assert list(differences(before, before)) == []


def test_a_byte_order_mark_does_not_shift_the_byte_that_is_named(tmp_path):
    """The decoder counts behind the mark: the byte named was another one, and at times its line."""
    path = tmp_path / "marked.txt"
    raw = b"\xef\xbb\xbfab\ncd \xff\n"
    with pytest.raises(DataError, match="line 2: byte 0xff is not UTF-8"):
        decode_text(raw, path)


def test_a_gzip_file_damaged_inside_is_refused(tmp_path):
    """``zlib.error`` is neither an OSError nor an EOFError."""
    path = tmp_path / "texts.txt.gz"
    whole = bytearray(gzip.compress(b"some text\n" * 500))
    whole[12:20] = b"\xff" * 8
    path.write_bytes(bytes(whole))
    with pytest.raises(DataFileError, match=r"texts\.txt\.gz cannot be read"):
        read_documents([path], Columns())
