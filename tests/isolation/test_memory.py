"""A processor's memory is bounded, however long it is used."""

import contextlib
import copy
import gc
import threading
import tracemalloc

import pytest
import torch

from .world import TEXTS, fresh


def live_tensors():
    """Bytes of all storages that Python can reach; each is counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            # Fake tensors of torch.compile have no memory.
            with contextlib.suppress(RuntimeError):
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("in_threads", [False, True], ids=["one thread", "a thread each"])
def test_memory_stays_flat_over_many_calls(pristine, request, monkeypatch, in_threads):
    """Every text is new; all memos are shrunk here, so that they soon fill up."""
    monkeypatch.setattr("fusion_detox.decoding.text_context._ENTRIES", 64)
    monkeypatch.setattr("fusion_detox.vocabulary.healing._MAX_TABLES", 64)
    monkeypatch.setattr("fusion_detox.decoding.session._MEMO_ENTRIES", 16)
    monkeypatch.setattr("fusion_detox.decoding.session._DIVERGENCE_ENTRIES", 64)
    tokenizer = request.getfixturevalue("other_tokenizer")
    processor = copy.deepcopy(fresh(pristine("other_tokenizer", "context")))
    generator = torch.Generator().manual_seed(0)
    size, rows = len(tokenizer), 5
    scores = torch.randn(rows, size, generator=generator)

    def use(calls):
        for _ in range(calls):
            ids = torch.randint(3, size, (rows, 7), generator=generator)
            for end in (5, 6, 7):
                processor(ids[:, :end], scores)

    def day(calls):
        if in_threads:
            for _ in range(calls // 10):
                thread = threading.Thread(target=use, args=(10,))
                thread.start()
                thread.join()
        else:
            use(calls)

    day(80)  # far more rows than any memo holds
    sizes, python = [], []
    tracemalloc.start()
    try:
        for _ in range(3):
            day(40)
            sizes.append(live_tensors())
            python.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # 200 rows per measurement: two tensors kept for each would be 200 * 2 * 400 * 4 bytes.
    assert max(sizes) - min(sizes) < 300_000, sizes
    # Objects from before tracing count only once they are replaced, so skip the first measurement.
    assert abs(python[2] - python[1]) < 100_000, python
    (session,) = processor._sessions.values()
    assert len(session._planner) <= 256
    assert len(processor._context._memo) <= 64


def test_every_memo_is_bounded(pristine, request):
    """With the real limits: what thousands of rows leave behind, part by part."""
    tokenizer = request.getfixturevalue("other_tokenizer")
    processor = copy.deepcopy(fresh(pristine("other_tokenizer")))
    generator = torch.Generator().manual_seed(0)
    size = len(tokenizer)
    scores = torch.randn(250, size, generator=generator)
    for _ in range(20):
        processor(torch.randint(3, size, (250, 6), generator=generator), scores)
    (session,) = processor._sessions.values()
    memo = session._memo
    assert len(session._planner) <= 256
    # The memo keeps one call's entries, which the next step needs, but never exceeds its limit.
    assert memo.bytes <= 256 * 2**20
    blocks = {id(e.block): e.block.values.nbytes for e in memo._entries.values()}
    assert memo.bytes == sum(blocks.values())
    assert len(processor._context._memo) <= 4096
    assert processor.vocabulary._tables.table.cache_info().currsize <= 2048
    before, freed = live_tensors(), memo.bytes
    assert freed > 250 * 5 * size * 4
    del memo, blocks
    processor.reset()
    assert before - live_tensors() >= freed


def test_the_text_memo_is_bounded_by_ids(pristine, request, monkeypatch):
    """Long rows are forgotten sooner: all stored ids and paths together are bounded."""
    monkeypatch.setattr("fusion_detox.decoding.text_context._ENTRY_IDS", 2**16)
    tokenizer = request.getfixturevalue("other_tokenizer")
    context = copy.copy(pristine("other_tokenizer")._context)
    row = tuple(tokenizer(" ".join(TEXTS) * 6, add_special_tokens=False)["input_ids"])
    assert len(row) > 500
    tracemalloc.start()
    try:
        for number in range(300):
            # As from a tensor: every row has its own integers.
            context.read(tuple(torch.tensor([*row, 3 + number]).tolist()))
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 50 < len(context._memo) <= 2**16 // len(row)
    # A pointer and an integer for each id and for each token of the path.
    assert used < 2**16 * 2 * (8 + 32)
    context.reset()
    assert context._memo == {}
    assert context._size == 0
