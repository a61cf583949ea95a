"""A session is defined by ``cached == uncached``; the other tests check how little it computes."""

import copy
import functools
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_detox.decoding import session as session_module
from fusion_detox.decoding.generic_decoder import GenericDecoder
from fusion_detox.decoding.session import CalibratorSession
from fusion_detox.decoding.stacked_llama import StackedLlamaDecoder
from fusion_detox.errors import ConfigError

CPU = torch.device("cpu")
WIDTH, VOCABULARY, CONTEXT = 64, 60, 12


def calibrator(clean, reference, **changes):
    values = {
        "clean": clean,
        "reference": reference,
        "tokenizer": None,
        "tokens": None,
        "context_length": CONTEXT,
        "bos_id": 1,
        "vocabulary_size": VOCABULARY,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.fixture(scope="module")
def llamas(make_llama):
    small = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": CONTEXT}
    return calibrator(make_llama(WIDTH, 1, **small), make_llama(WIDTH, 2, **small))


@pytest.fixture(scope="module")
def gpt2s(make_gpt2):
    small = {"n_embd": 16, "n_positions": CONTEXT}
    return calibrator(make_gpt2(WIDTH, 1, **small), make_gpt2(WIDTH, 2, **small))


@pytest.fixture(scope="module")
def mixed(llamas, gpt2s):
    """A calibrator with two kinds of models, for which there is no faster path."""
    return calibrator(llamas.clean, gpt2s.clean)


@pytest.fixture(scope="module")
def sessions(llamas, gpt2s, mixed):
    """A session of each kind, some so small that they evict and copy constantly."""
    return {
        "stacked": CalibratorSession(llamas, device=CPU),
        "stacked, tight": CalibratorSession(llamas, device=CPU, max_rows=3),
        "gpt2": CalibratorSession(gpt2s, device=CPU),
        "mixed, tight": CalibratorSession(mixed, device=CPU, max_rows=3),
    }


@functools.cache
def uncached_window(model, window):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0, -1]
    return logits[:VOCABULARY].float().log_softmax(-1)


def uncached(calibrator, prefix):
    """``(distributions, vocab)`` by a plain forward pass; the window moves in strides."""
    start = 0
    while 1 + len(prefix) - start > CONTEXT:
        start += CONTEXT // 2
    window = (calibrator.bos_id, *prefix[start:])
    models = [calibrator.clean, calibrator.reference]
    return torch.stack([uncached_window(m, window) for m in models if m is not None])


def check(session, prefixes):
    found = session.log_probs(prefixes)
    assert found.shape == (session._decoder.distributions, len(prefixes), VOCABULARY)
    if not prefixes:
        return
    expected = [uncached(session._calibrator, prefix) for prefix in prefixes]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected, 1), atol=1e-4, rtol=1e-4)


# Changes between calls. The number picks a row, or says how large the change is.
CHANGES = {
    "extend": lambda rows, n: [(*row, 2 + (n + i) % 3) for i, row in enumerate(rows)],
    "extend by many": lambda rows, n: [
        row + (2 + n % 3, 2, 3) * (1 + (i + n) % 3) for i, row in enumerate(rows)
    ],
    "roll back": lambda rows, n: [
        row[: max(0, len(row) - 1 - (i + n) % 5)] for i, row in enumerate(rows)
    ],
    "retokenise": lambda rows, n: [(*row[:-2], 2 + n % 3, 4, 2)[: len(row) + 1] for row in rows],
    "permute": lambda rows, n: rows[n % len(rows) :] + rows[: n % len(rows)],
    "beams": lambda rows, n: [(*rows[n % len(rows)], 2 + i) for i in range(len(rows))],
    "duplicate": lambda rows, n: [*rows, rows[n % len(rows)], (*rows[n % len(rows)], 3)],
    "drop": lambda rows, n: rows[: n % len(rows)] + rows[n % len(rows) + 1 :],
    "add": lambda rows, n: [*rows, (2 + n % 3,) * n],
}
OTHERS = ["earlier", "both", "forget"]


def play(session, history):
    """Change and query two conversations of several rows each, in turn."""
    session.reset()
    conversations = [[(2, 3, 2)], [(3, 3), (2,)]]
    for operation, one, number in history:
        rows = asked = conversations[one] or [()]
        if operation in CHANGES:
            rows = asked = CHANGES[operation](rows, number)[:6]
        elif operation == "earlier":
            asked = [row[: max(0, len(row) - back)] for row in rows for back in range(4)]
        elif operation == "both":
            asked = conversations[0] + conversations[1]
        elif operation == "forget":
            session._memo = session_module._Memo()
        conversations[one] = rows
        check(session, asked)


histories = st.lists(
    st.tuples(
        st.sampled_from([*CHANGES, "extend", *OTHERS]), st.integers(0, 1), st.integers(0, 14)
    ),
    min_size=2,
    max_size=12,
)


@pytest.mark.parametrize(
    ("name", "examples"),
    [("stacked", 200), ("stacked, tight", 200), ("gpt2", 60), ("mixed, tight", 60)],
)
def test_cached_equals_uncached(sessions, monkeypatch, name, examples):
    if "tight" in name:
        monkeypatch.setattr(session_module, "_EXPENDABLE", 1)
        monkeypatch.setattr(session_module, "_IDLE_CALLS", 2)
        monkeypatch.setattr(session_module, "_FEW_TOKENS", 2)
        monkeypatch.setattr(session_module, "_FORWARD_TOKENS", 16)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(histories)
    def run(history):
        play(sessions[name], history)

    run()


@pytest.fixture
def session(llamas):
    return CalibratorSession(llamas, device=CPU)


@pytest.fixture
def work(session, monkeypatch):
    """The rows passed to the session's decoder, one list per call of ``logits``."""
    calls = []
    inner = session._decoder.logits

    def logits(rows):
        calls.append(rows)
        return inner(rows)

    monkeypatch.setattr(session._decoder, "logits", logits)
    return calls


def fed(calls):
    """Return the numbers of tokens fed since the last check."""
    counts = [sorted(len(row.tokens) for row in rows) for rows in calls]
    calls.clear()
    return counts


def test_the_fast_path_is_used_when_possible(session, sessions):
    assert isinstance(session._decoder, StackedLlamaDecoder)
    assert isinstance(sessions["gpt2"]._decoder, GenericDecoder)
    assert isinstance(sessions["mixed, tight"]._decoder, GenericDecoder)


def test_only_new_tokens_are_fed(session, work):
    a, b = (5, 6, 7, 8), (9, 8)
    check(session, [a, b, a])
    assert fed(work) == [[3, 5]]
    check(session, [(*b, 2), (*a, 3)])
    assert fed(work) == [[1, 1]]
    check(session, [(*b, 2), (*a, 3), a, b])  # the memo has them all
    assert fed(work) == []
    check(session, [(*a, 3, 4, 5), (*b, 2, 2)])
    assert fed(work) == [[1, 2]]
    check(session, [(*a, 3, 9), (*b, 2, 2, 2)])  # a rejected draft
    assert fed(work) == [[1, 1]]


def test_beams_copy_a_slot_and_release_dead_ones(session, work):
    beams = [(5, 6, 7, token) for token in range(4)]
    check(session, beams)
    assert fed(work) == [[5] * 4]
    parents = [beams[2], beams[2], beams[0], beams[2]]
    check(session, [(*parent, 10 + i) for i, parent in enumerate(parents)])
    assert fed(work) == [[1] * 4]
    assert len(session._planner) == 4


def test_positions_on_one_path_are_one_row(session, work):
    path = (4, 5, 6, 7, 8)
    check(session, [path[:end] for end in (5, 3, 4, 2)])
    assert fed(work) == [[6]]
    check(session, [path[:1], (*path, 9)])  # fed again from the first requested position
    assert fed(work) == [[6]]


def test_interleaved_conversations_keep_their_slots(session, work, monkeypatch):
    monkeypatch.setattr(session_module, "_EXPENDABLE", 1)
    one, two = (5,) * 9, (5, 6, 7, 8)
    check(session, [one])
    check(session, [two])
    fed(work)
    for token in (2, 3):
        one, two = (*one, token), (*two, token)
        check(session, [one])
        check(session, [two])
    assert fed(work) == [[1]] * 4


def test_the_window_moves_in_strides(session, work):
    text = tuple(2 + i % 50 for i in range(40))
    counts = []
    for end in range(len(text)):
        check(session, [text[:end]])
        counts += [count for counts in fed(work) for count in counts]
    # A new window starts with half of the previous one; each further step feeds one token.
    assert sorted(set(counts)) == [1, CONTEXT // 2]
    assert counts.count(CONTEXT // 2) == 5


def test_memory_is_bounded_and_freed(llamas, monkeypatch):
    monkeypatch.setattr(session_module, "_MEMO_ENTRIES", 10)
    session = CalibratorSession(llamas, device=CPU, max_rows=4)
    store = session._decoder._store
    for start in range(0, 60, 5):
        check(session, [(2 + row % 50, 3) for row in range(start, start + 5)])
        assert len(session._planner) <= 4
        assert store.slots == len(session._planner)
        assert len(session._memo) <= 8 * 5
    row = 2 * VOCABULARY * 4
    blocks = {id(e.block): e.block for e in session._memo._entries.values()}
    assert session._memo.bytes == sum(block.values.nbytes for block in blocks.values())
    monkeypatch.setattr(session_module, "_MEMO_BYTES", 6 * row)
    check(session, [(7, 7, row) for row in range(5)])
    assert session._memo.bytes <= 6 * row
    session.reset()
    assert store.slots == 0
    assert len(session._memo) == 0
    check(session, [(7, 7)])


def test_no_requests(session):
    assert session.log_probs([]).shape == (2, 0, VOCABULARY)
    check(session, [()])


def test_without_a_reference(llamas, gpt2s):
    for both in (llamas, gpt2s):
        alone = calibrator(both.clean, None)
        session = CalibratorSession(alone, device=CPU)
        check(session, [(3, 4), (5,)])
        check(session, [(3, 4, 5), (5,), (5, 6)])


def test_results_belong_to_the_caller(session):
    session.log_probs([(3, 4), (5,)]).zero_()
    found = session.log_probs([(3, 4), (5,)])
    found.zero_()
    check(session, [(3, 4), (5,)])


def test_the_callers_modes_do_not_matter(session):
    with torch.inference_mode():
        check(session, [(3, 4)])
    check(session, [(3, 4, 5)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        session.log_probs([(3, 4, 5, 6), (9, 9)])
    check(session, [(3, 4, 5, 6), (9, 9)])
    with torch.enable_grad():
        assert not session.log_probs([(3, 4, 7)]).requires_grad


def test_a_failed_call_corrupts_nothing(session, monkeypatch):
    texts = [(5, 6, 7), (5, 6, 8, 9), (4,)]
    check(session, texts)
    inner = session._decoder.logits

    def fail(rows):
        inner([row._replace(tokens=(50,) * len(row.tokens)) for row in rows])
        raise KeyboardInterrupt

    later = [(*texts[1], 2), (*texts[1], 3), (5, 6, 9, 9), (4, 4)]
    with monkeypatch.context() as patch:
        patch.setattr(session._decoder, "logits", fail)
        with pytest.raises(KeyboardInterrupt):
            session.log_probs(later)
    session._memo = session_module._Memo()
    check(session, later + texts)


def test_threads(session):
    errors = []

    def work(first):
        try:
            text = (first,)
            for token in range(2, 30):
                text = (*text, token)
                check(session, [text, text[:-2], (first, token)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_copies_have_no_cache(session):
    check(session, [(3, 4)])
    for other in (copy.copy(session), copy.deepcopy(session), pickle.loads(pickle.dumps(session))):
        assert len(other._memo) == 0
        assert len(other._planner) == 0
        assert torch.equal(other.log_probs([(3, 4)]), session.log_probs([(3, 4)]))
    check(session, [(3, 4, 5)])


def test_half_precision_is_computed_in_float32_on_the_cpu(make_llama, make_gpt2):
    for make in (make_llama, make_gpt2):
        model = make(WIDTH, 3).to(torch.bfloat16)
        session = CalibratorSession(calibrator(model, None), device=CPU)
        assert model.dtype == torch.bfloat16
        exact = make(WIDTH, 3)
        exact.load_state_dict(model.state_dict())
        found = session.log_probs([(3, 4, 5)])
        expected = uncached(calibrator(exact, None), (3, 4, 5))
        torch.testing.assert_close(found[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_at_least_one_row(llamas):
    with pytest.raises(ConfigError, match="max_rows must be at least 1, but is 0"):
        CalibratorSession(llamas, device=CPU, max_rows=0)
