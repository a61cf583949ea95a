import json
from dataclasses import replace

import pytest

from fusion_detox.errors import DataError
from fusion_detox.evaluation.samples import Sample, SampleFiles
from fusion_detox.generation.sampling import Job

ROW = Sample(1, 0, 0, (4, 5), "a\u2028b\n\ud83d é", "length")


def rows(count):
    return [replace(ROW, index=i) for i in range(count)]


def write(folder, items, rank=0):
    with SampleFiles(folder, "s", rank).open() as write_row:
        for row in items:
            write_row(row)


def test_written_rows_are_read_back(tmp_path):
    write(tmp_path, rows(3))
    assert list(SampleFiles(tmp_path, "s").read().values()) == rows(3)
    text = (tmp_path / "s.0.jsonl").read_text("utf-8", errors="surrogatepass")
    assert len(text.splitlines()) == 3


def test_missing_jobs(tmp_path):
    jobs = [Job(i, k, f"prompt {i}") for i in range(3) for k in range(2)]
    write(tmp_path, [ROW, replace(ROW, index=2, sample=1)])
    files = SampleFiles(tmp_path, "s")
    found = files.missing(jobs, seeds=(1, 2))
    missing = [(job.index, job.sample) for job in found[1]]
    assert missing == [(0, 1), (1, 0), (1, 1), (2, 0)]
    assert found[2] == jobs


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_written_again(tmp_path, cut):
    write(tmp_path, rows(3))
    path = tmp_path / "s.0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row.index for row in SampleFiles(tmp_path, "s").read().values()] == [0, 1]
    write(tmp_path, [replace(ROW, index=2)])
    assert list(SampleFiles(tmp_path, "s").read().values()) == rows(3)


def test_each_process_writes_its_own_file_and_reads_all(tmp_path):
    write(tmp_path, rows(2), rank=0)
    write(tmp_path, [replace(ROW, index=2)], rank=1)
    with (tmp_path / "s.1.jsonl").open("ab") as killed:
        killed.write(b'{"seed": 1, "ind')
    assert [row.index for row in SampleFiles(tmp_path, "s", rank=5).read().values()] == [0, 1, 2]


def test_a_foreign_last_line_is_never_cut_off(tmp_path):
    path = tmp_path / "s.0.jsonl"
    path.write_text("my diary")
    with pytest.raises(DataError, match=r"line 1 of .*s\.0\.jsonl is not a continuation"):
        write(tmp_path, rows(1))
    assert path.read_text() == "my diary"


def test_rows_of_other_settings_are_not_read(tmp_path):
    write(tmp_path, rows(1))
    assert SampleFiles(tmp_path, "t").read() == {}


@pytest.mark.parametrize("line", [b"{}", b"[1]", b"null", b'{"seed": "x"}', b"\xff\xfe"])
def test_the_error_names_a_damaged_line(tmp_path, line):
    write(tmp_path, rows(1))
    path = tmp_path / "s.0.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"line 1 of .*s\.0\.jsonl is not a continuation"):
        SampleFiles(tmp_path, "s").read()


def test_rows_are_plain_json(tmp_path):
    write(tmp_path, rows(1))
    row = json.loads((tmp_path / "s.0.jsonl").read_bytes())
    assert list(row) == ["seed", "index", "sample", "ids", "text", "finish"]
