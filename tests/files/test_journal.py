"""Journals keep complete rows, cut off a torn last line, and leave foreign text alone."""

import io
import json

import pytest

from fusion_detox.files.journal import DamagedLineError, Journal, append_row


class SlowStream(io.BytesIO):
    """Accepts three bytes per call, as an unbuffered file may."""

    def write(self, data):
        return super().write(bytes(data[:3]))


def test_a_row_is_one_line_even_if_the_stream_accepts_little_at_a_time():
    row = {"text": "a\x85b\u2028c\u2029d\ne é 🙂"}
    stream = SlowStream()
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


def rows(journal):
    return [(number, json.loads(line)) for number, line in journal.read()]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Journal(path, "id").open() as append:
        append({"id": 1})
        append({"id": 2, "text": "é"})
    return path


def test_a_missing_file_has_no_rows_and_is_not_created(tmp_path):
    assert Journal(tmp_path / "rows.jsonl", "id").read() == []
    assert not list(tmp_path.iterdir())


def test_a_run_resumes_where_the_last_one_stopped(path):
    journal = Journal(path, "id")
    assert rows(journal) == [(1, {"id": 1}), (2, {"id": 2, "text": "é"})]
    with journal.open(sync=True) as append:
        append({"id": 3})
        assert rows(journal) == [(3, {"id": 3})]
        append({"id": 4})
    assert rows(journal) == [(4, {"id": 4})]
    journal.forget()
    assert [number for number, _ in rows(journal)] == [1, 2, 3, 4]


@pytest.mark.parametrize("torn", [b"{", b'{"id": ', b'{"id": 3, "text": "\xc3'])
def test_a_torn_line_is_skipped_and_cut_off(path, torn):
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    journal = Journal(path, "id")
    assert len(journal.read()) == 2
    assert path.read_bytes() == whole + torn, "reading changes nothing"
    assert journal.cut_torn_line()
    assert path.read_bytes() == whole
    assert not journal.cut_torn_line()
    path.write_bytes(whole + torn)
    with journal.open() as append:
        append({"id": 3})
    assert path.read_bytes() == whole + b'{"id": 3}\n'


@pytest.mark.parametrize("foreign", [b"a diary", b'{"other": 1'])
def test_a_foreign_last_line_is_refused(path, foreign):
    content = path.read_bytes() + foreign
    path.write_bytes(content)
    with pytest.raises(DamagedLineError) as caught:
        Journal(path, "id").read()
    assert caught.value.number == 3
    assert path.read_bytes() == content


def test_lone_surrogates_survive_in_a_journal(path):
    journal = Journal(path, "id")
    journal.read()
    with journal.open() as append:
        append({"id": 3, "text": "a\ud83d"})
    assert rows(journal) == [(3, {"id": 3, "text": "a\ud83d"})]
