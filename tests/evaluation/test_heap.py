"""Freed memory is returned once the process has grown enough."""

import ctypes

import pytest

from fusion_detox.evaluation import heap


@pytest.fixture
def process(monkeypatch):
    """A fake process whose size the tests set."""

    class Process:
        sizes = (0,)
        trims = 0

        def trim(self, _):
            self.trims += 1
            self.sizes = [100 * 2**20] * 99

    one = Process()
    monkeypatch.setattr(heap, "_resident", lambda: one.sizes[0])
    keeper = heap.Heap()
    keeper._trim = one.trim

    def look(megabytes):
        one.sizes = [megabytes * 2**20]
        for _ in range(16):
            keeper.watch()
        return one.trims

    return look


def test_memory_is_trimmed_after_the_process_has_grown(process):
    assert process(300) == 0
    assert process(511) == 0
    assert process(520) == 1
    assert process(600) == 1, "growth counts from the size after trimming"
    assert process(700) == 2


def test_the_size_of_the_process_is_read():
    before = heap._resident()
    if before == 0:
        pytest.skip("the size of the process is unknown on this system")
    block = ctypes.create_string_buffer(64 * 2**20)
    ctypes.memset(block, 1, len(block))
    assert 60 * 2**20 < heap._resident() - before < 90 * 2**20


def test_without_glibc_and_proc_nothing_happens(monkeypatch, tmp_path):
    monkeypatch.setattr(heap, "_STATM", tmp_path / "missing")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    keeper = heap.Heap()
    assert heap._resident() == 0
    for _ in range(64):
        keeper.watch()
