"""Nothing leaks: a row, call, thread or copy never changes the results of another."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor

from fusion_detox import FusionLogitsProcessor
from fusion_detox.errors import VocabularyError

from .world import EXACT, TEXTS, VOCABULARIES, World, fresh, inner_parts, interrupt, scores_for


def new_rows(world, rows, n):
    text = world.texts[n % len(world.texts)]
    return [text, (world.token(n),), text[: 1 + n % len(text)], *rows][:4]


# The rows of the next call, from the rows of the last call and a number.
ROWS = {
    "call": lambda world, rows, n: rows,
    "grow": lambda world, rows, n: [(*row, world.token(n + 7 * i)) for i, row in enumerate(rows)],
    "shorten": lambda world, rows, n: [row[: max(1, len(row) - n % 6)] for row in rows],
    "permute": lambda world, rows, n: [*rows[n % len(rows) :], *rows[: n % len(rows)]],
    "beams": lambda world, rows, n: [(*rows[n % len(rows)], 3 + i) for i in range(3)],
    "repeat": lambda world, rows, n: [*rows, rows[n % len(rows)]][:5],
    "new rows": new_rows,
}


def fails(world, ids, scores, n):
    # Endings that differ from the remembered ones, so that those are overwritten.
    other = ids.clone()
    other[:, -1 - n % 3 :] = world.token(n)
    interrupt(world.processor, n, other, scores)


def too_wide(world, ids, scores, n):
    with pytest.raises(VocabularyError, match="columns"):
        world.processor(ids, torch.zeros(len(ids), 9000))


def too_narrow(world, ids, scores, n):
    narrow = torch.zeros(len(ids), 11)
    assert world.processor(ids, narrow) is narrow


def in_inference_mode(world, ids, scores, n):
    with torch.inference_mode():
        world.processor(ids, scores)


def with_broken_rows(world, ids, scores, n):
    scores[0, : [5, -1][n % 2]] = [torch.nan, -torch.inf][n % 2]
    world.processor(ids, scores)


def replaced(duplicate):
    def replace(world, ids, scores, n):
        world.processor = duplicate(world.processor)

    return replace


# What else may happen to the processor before a call.
EVENTS = {
    "fails": fails,
    "too wide": too_wide,
    "too narrow": too_narrow,
    "inference mode": in_inference_mode,
    "broken rows": with_broken_rows,
    "reset": lambda world, ids, scores, n: world.processor.reset(),
    "copy": replaced(copy.copy),
    "deepcopy": replaced(copy.deepcopy),
    "pickle": replaced(lambda processor: pickle.loads(pickle.dumps(processor))),
    "another processor": lambda world, ids, scores, n: world.neighbour.check(
        [row for row in world.neighbour.texts if len(row) > n % 9][:2]
    ),
}
HISTORIES = st.lists(
    st.tuples(
        st.sampled_from([*ROWS, *EVENTS, "grow", "fails"]), st.integers(0, 200), st.integers(0, 3)
    ),
    min_size=3,
    max_size=10,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocabulary", "config"),
    [
        ("byte_tokenizer", "contrast"),
        ("other_tokenizer", "contrast"),
        ("other_tokenizer", "budget"),
        ("other_tokenizer", "context"),
        ("byte_tokenizer", "context"),
        ("sentencepiece_tokenizer", "product"),
        ("sentencepiece_tokenizer", "mixture"),
    ],
)
def test_no_history_changes_a_result(pristine, request, vocabulary, config):
    """Calls, failures, copies and a second processor on the same calibrator, in any order."""
    tokenizer = request.getfixturevalue(vocabulary)
    other = "other_tokenizer" if vocabulary != "other_tokenizer" else "sentencepiece_tokenizer"
    neighbour = World(pristine(other, "mixture"), request.getfixturevalue(other))
    wanted = {}

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(HISTORIES)
    def run(history):
        world = World(pristine(vocabulary, config), tokenizer, wanted, neighbour)
        rows = [world.texts[0], world.texts[1]]
        for operation, number, padding in history:
            if operation in ROWS:
                rows = ROWS[operation](world, rows, number)
            else:
                shown, ids = world.batch(rows)
                EVENTS[operation](world, ids, scores_for(shown, world.size), number)
            world.check(rows, padding)

    run()


def before_and_after(world):
    """Return rows to remember, and rows that share their beginnings and take their slots."""
    start = world.texts[0]
    rows = [world.texts[2][:3], (*start, 20, 21)]
    # All of equal length, because one vocabulary has no padding.
    other = [(*start, 30, 31), (*start, 33, 34), (*world.texts[4], 35)[: len(start) + 2]]
    return rows, [row for row in other if len(row) == len(start) + 2]


@pytest.mark.parametrize("vocabulary", ["byte_tokenizer", "other_tokenizer"])
@pytest.mark.parametrize("number", range(36))
def test_an_interrupted_call_corrupts_nothing(pristine, request, number, vocabulary):
    """Each part fails once: at its first, second or third use, and before or after its work."""
    world = World(pristine(vocabulary), request.getfixturevalue(vocabulary))
    rows, other = before_and_after(world)
    for row in rows:
        world.check([row])
    shown, ids = world.batch(other)
    interrupt(world.processor, number, ids, scores_for(shown, world.size))
    # The continuations use the keys and values that are left. The row read last comes first, before
    # its slot is reused.
    for row in (*rows[::-1], *other):
        world.check([(*row, 40)])
    for row in (*rows, *other):
        world.check([row])


def test_every_interruption_is_reached(pristine, request):
    """A call reaches each of these parts, so none of the tests above is empty."""
    reached = set()
    for number in range(36):
        world = World(pristine("other_tokenizer"), request.getfixturevalue("other_tokenizer"))
        rows, other = before_and_after(world)
        for row in rows:
            world.check([row])
        shown, ids = world.batch(other)
        parts = list(inner_parts(world.processor))
        if interrupt(world.processor, number, ids, scores_for(shown, world.size)):
            reached.add(parts[number % len(parts)][1:])
    assert len(parts) == 12
    assert reached == {part[1:] for part in parts}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_neighbouring_rows_do_not_matter(pristine, request, vocabulary):
    """Rows of NaN, +inf, no allowed token, only padding or unknown ids do not change other rows."""
    tokenizer = request.getfixturevalue(vocabulary)
    world = World(pristine(vocabulary), tokenizer)
    row = world.texts[0]
    length, size = len(row), world.size
    special = tokenizer.bos_token_id
    neighbours = [
        (special,) * length,
        (*row[:-1], special),
        tuple(range(size - length, size)),
        (size + 5,) * length,
        (*row[:-1], -1),
        row,
    ]
    spoiled = [torch.nan, torch.inf, -torch.inf, None]
    for value in spoiled:
        rows = [row, *neighbours]
        scores = scores_for(rows, size)
        if value is not None:
            scores[1:] = value
        found = fresh(world.pristine)(torch.tensor(rows), scores)
        torch.testing.assert_close(found[0], world.wanted(row), **EXACT)
        if value is None:
            assert torch.isfinite(found).all()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_amount_of_padding_changes_no_bit(pristine, request, vocabulary):
    tokenizer = request.getfixturevalue(vocabulary)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    base = FusionLogitsProcessor(pristine(vocabulary).calibrator, tokenizer, pad_token_id=pad)
    texts = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"])[:3] for t in TEXTS[:3]]
    scores = scores_for(texts, len(tokenizer))
    wanted = fresh(base)(torch.tensor(texts), scores)
    for padding in (1, 2, 31, 200):
        ids = torch.tensor([(pad,) * padding + text for text in texts])
        assert torch.equal(fresh(base)(ids, scores), wanted)


# Threads and nested calls


def read_all(world, first):
    for text in world.texts[first::2]:
        for end in range(1, len(text) + 1):
            world.check([text[:end]])


def disturb(worlds, done):
    while not done.is_set():
        for world in worlds:
            world.processor.reset()
            copy.deepcopy(world.processor)
            pickle.loads(pickle.dumps(world.processor)).reset()


def test_threads_with_processors_on_one_calibrator(pristine, request):
    """Six threads share three processors and one calibrator; another thread copies and resets."""
    worlds = []
    for vocabulary in VOCABULARIES:
        world = World(pristine(vocabulary), request.getfixturevalue(vocabulary))
        read_all(world, 0)
        read_all(world, 1)
        world.processor = fresh(world.pristine)
        worlds.append(world)
    done = threading.Event()
    with ThreadPoolExecutor(7) as pool:
        disturbing = pool.submit(disturb, worlds, done)
        reading = [pool.submit(read_all, world, first) for world in worlds for first in (0, 1)]
        try:
            for future in reading:
                future.result()
        finally:
            done.set()
        disturbing.result()


class GeneratesMeanwhile(LogitsProcessor):
    """Runs a complete second ``generate`` with the same processor at each step of the first."""

    def __init__(self, run):
        self.run = run
        self.results = []

    def __call__(self, input_ids, scores):
        self.results.append(self.run())
        return scores


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}], ids=str
)
def test_generate_inside_generate(pristine, request, make_llama, how):
    tokenizer = request.getfixturevalue("other_tokenizer")
    model = make_llama(len(tokenizer), seed=6)
    processor = fresh(pristine("other_tokenizer"))
    outer, inner = (tokenizer(t, return_tensors="pt")["input_ids"] for t in TEXTS[:2])

    def generate(ids, processors, **how):
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            pad_token_id=0,
            logits_processor=processors,
            **how,
        ).tolist()

    alone = [generate(ids, [fresh(processor)], **how) for ids in (outer, inner)]
    meanwhile = GeneratesMeanwhile(lambda: generate(inner, [processor], **how))
    assert generate(outer, [processor, meanwhile], **how) == alone[0]
    assert len(meanwhile.results) == 6
    assert all(result == alone[1] for result in meanwhile.results)
