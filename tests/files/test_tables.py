"""All readers of data share one table reader."""

import gzip
import json
import tracemalloc

import pytest

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.tables import LINE, is_hub_id, read_table, read_text, text_field


def read(path, content, **options):
    path.write_bytes(content)
    return read_table(path, **options)


def test_a_byte_order_mark_does_not_shift_the_byte_in_the_message(tmp_path):
    """The decoder counts bytes from after the mark."""
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfab\ncd \xff\n")
    with pytest.raises(DataError, match="line 2: byte 0xff is not UTF-8"):
        read_text(path)


def test_a_gzip_file_damaged_inside_is_refused(tmp_path):
    """``zlib.error`` is neither an OSError nor an EOFError."""
    path = tmp_path / "texts.txt.gz"
    whole = bytearray(gzip.compress(b"some text\n" * 500))
    whole[12:20] = b"\xff" * 8
    path.write_bytes(bytes(whole))
    with pytest.raises(DataFileError, match=r"texts\.txt\.gz cannot be read"):
        read_text(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "one", "n": "1"}\n\n{"text": "two", "n": "2"}\n'),
        ("a.ndjson", b'\xef\xbb\xbf{"text": "one", "n": "1"}\r\n{"text": "two", "n": "2"}'),
        ("a.json", b'[{"text": "one", "n": "1"}, {"text": "two", "n": "2"}]'),
        ("lines.json", b'{"text": "one", "n": "1"}\n{"text": "two", "n": "2"}\n'),
        ("unnamed", b'{"text": "one", "n": "1"}\n{"text": "two", "n": "2"}\n'),
        ("a.CSV", b"text,n\none,1\ntwo,2\n"),
        ("a.tsv.gz", gzip.compress(b"text\tn\none\t1\ntwo\t2\n", mtime=0)),  # part of the name
    ],
)
def test_all_formats_give_the_same_rows(tmp_path, name, content):
    table = read(tmp_path / name, content)
    assert [row.values for row in table.rows] == [
        {"text": "one", "n": "1"},
        {"text": "two", "n": "2"},
    ]
    assert table.form == "rows"


def test_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "a.txt"
    table = read(path, "one\n\n two\u2028 \r\n".encode())
    assert table.rows == [
        ({LINE: "one"}, f"{path} line 1"),
        ({LINE: " two\u2028 "}, f"{path} line 3"),
    ]
    assert table.form == "lines"


def test_any_file_can_be_read_as_lines_or_as_rows(tmp_path):
    path, content = tmp_path / "a.csv", b"text\none\n"
    assert [row.values for row in read(path, content, as_lines=True).rows] == [
        {LINE: "text"},
        {LINE: "one"},
    ]
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read(tmp_path / "a.txt", b"one\n", as_lines=False)


def test_content_that_has_already_been_read(tmp_path):
    path = tmp_path / "standard input"
    (row,) = read_table(path, raw=b"one\n").rows
    assert row == ({LINE: "one"}, f"{path} line 1")


def test_a_single_object_is_distinguished_from_rows(tmp_path):
    assert read(tmp_path / "a.json", json.dumps({"a": {"b": 1}}).encode()).form == "object"


def test_long_fields_of_tables(tmp_path):
    (row,) = read(tmp_path / "a.csv", b"text\n" + b"a" * 300_000 + b"\n").rows
    assert len(row.values["text"]) == 300_000


def test_fields_inside_objects(tmp_path):
    (row,) = read(tmp_path / "a.jsonl", b'{"a": {"b": "one", "c": null}, "d": 3}').rows
    assert text_field(row, "x", "a.b") == "one"
    assert text_field(row, "a.c") == ""
    with pytest.raises(DataError, match="field 'd' must hold text, but holds 3"):
        text_field(row, "d")
    with pytest.raises(DataError, match=r"line 1 has no field 'a\.x' or 'y'; it has: a, d"):
        text_field(row, "a.x", "y")


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name")
    assert is_hub_id("org/name:split")
    assert not any(map(is_hub_id, ["name", "org/name.csv", "org/name.txt.gz", "a/b/c"]))
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("text")
    assert not is_hub_id("org/name")


def test_a_gzip_bomb_is_refused_within_little_memory(tmp_path):
    path = tmp_path / "bomb.txt.gz"
    block = gzip.compress(b" " * (1 << 24), mtime=0)
    path.write_bytes(block * 64)  # 1 GiB in 1 MB
    tracemalloc.start()
    try:
        with pytest.raises(DataFileError, match=r"expands to more than .*gunzip"):
            read_text(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 28
    finally:
        tracemalloc.stop()


def test_a_gzip_file_that_repeats_itself_is_read(tmp_path):
    path = tmp_path / "log.txt.gz"
    path.write_bytes(gzip.compress(b"the same line again\n" * 100_000, mtime=0))
    assert len(read_text(path)[0]) == 2_000_000


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv"])
def test_lines_have_a_limit(tmp_path, name, monkeypatch):
    monkeypatch.setattr("fusion_detox.files.tables._MAX_LINE", 1000)
    path = tmp_path / name
    for length, refused in ((900, False), (1100, True)):
        text = "x" * length
        row = json.dumps({"a": text}) if name == "a.jsonl" else text
        path.write_text(f"{row}\n" if name in ("a.txt", "a.jsonl") else f"a\n{row}\n")
        if refused:
            with pytest.raises(DataError, match=r"line [12].*(1,000 are read|limit \(1000\))"):
                read_table(path)
        else:
            assert len(read_table(path).rows) == 1


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"], ids=["deep", "long"])
def test_extreme_json_is_refused(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match="JSON"):
        read_table(path)
