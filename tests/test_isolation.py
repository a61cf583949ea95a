"""Nothing leaks: what one row, call, thread or copy did never changes another's numbers.

The oracle is a processor that has seen nothing but one row. What is compared with it has a past.
"""

import copy
import gc
import hashlib
import json
import logging
import os
import pickle
import random
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor
from transformers.utils import logging as transformers_logging

from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor
from fusion_detox.errors import VocabularyError
from fusion_detox.generation import Sampling, generate_rows, jobs
from fusion_detox.loading import quiet_transformers

VOCABULARIES = ["byte_tokenizer", "other_tokenizer", "sentencepiece_tokenizer"]
CONTRAST = FusionConfig(strength=1.5, plausibility=0.0, threshold=0.05)
CONFIGS = {
    "contrast": CONTRAST,
    "budget": FusionConfig(strength=2.0, plausibility=0.01, kl_budget=0.1),
    "product": FusionConfig(rule="product", strength=0.5),
    "mixture": FusionConfig(rule="mixture", strength=0.7, outside="remove"),
}
EXACT = {"atol": 1e-4, "rtol": 1e-4}
TEXTS = [
    "You are a complete",
    "The weather was",
    "What a damn stupid thing to say! Shut",
    "naïve 東京 🙂",
    "In 1987 the town built a new school; 240 pupils came in the first year. Thank you so much",
]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSION_DETOX_CACHE", str(tmp_path_factory.mktemp("maps")))
        yield


@pytest.fixture(scope="module")
def shared(byte_tokenizer, make_llama):
    """One calibrator for all processors of this file."""
    width = len(byte_tokenizer)
    return Calibrator(
        make_llama(width, seed=1), make_llama(width, seed=2), byte_tokenizer, context_length=32
    )


@pytest.fixture(scope="module")
def pristine(shared, request):
    """A processor by vocabulary and config that never runs itself: see ``fresh``."""
    made = {}

    def make(vocabulary, config="contrast"):
        if (vocabulary, config) not in made:
            tokenizer = request.getfixturevalue(vocabulary)
            made[vocabulary, config] = FusionLogitsProcessor(shared, tokenizer, CONFIGS[config])
        return made[vocabulary, config]

    return make


def fresh(processor):
    """One without a past: copies carry no memo (which is tested below), and its map is shared."""
    other = copy.copy(processor)
    other._sessions = {}
    other._context = copy.copy(processor._context)
    return other


def scores_for(rows, width):
    """Scores of each row by itself: a function of its ids, as a model's are."""
    digests = [hashlib.sha256(repr(row).encode()).digest() for row in rows]
    seeds = [int.from_bytes(digest[:6], "big") for digest in digests]
    return torch.stack(
        [2 * torch.randn(width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


class World:
    """A processor with a past, and what each row's numbers must be whatever that past is."""

    def __init__(self, pristine, tokenizer, wanted=None, neighbour=None):
        self.pristine, self.size = pristine, len(tokenizer)
        self.pad = tokenizer.pad_token_id
        self.neighbour = neighbour
        self.texts = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]
        self.processor = fresh(pristine)
        self._wanted = {} if wanted is None else wanted

    def token(self, number):
        return 3 + number % (self.size - 3)

    def wanted(self, row):
        if row not in self._wanted:
            ids = torch.tensor([row], dtype=torch.long)
            scores = scores_for([row], self.size)
            self._wanted[row] = fresh(self.pristine)(ids, scores)[0]
        return self._wanted[row]

    def batch(self, rows, padding=0):
        """Ids as ``generate`` hands them over: left padded, or of one length without padding."""
        longest = max(map(len, rows))
        if self.pad is None:
            rows = [row for row in rows if len(row) == longest]
            padding = 0
        width = longest + padding
        ids = [(self.pad,) * (width - len(row)) + row for row in rows]
        return rows, torch.tensor(ids, dtype=torch.long).view(len(rows), width)

    def check(self, rows, padding=0, processor=None):
        rows, ids = self.batch(rows, padding)
        scores = scores_for(rows, self.size)
        found = (processor or self.processor)(ids, scores)
        assert torch.equal(scores, scores_for(rows, self.size))
        for row, result in zip(rows, found, strict=True):
            torch.testing.assert_close(result, self.wanted(row), **EXACT)


class BrokenError(Exception):
    """What the tests below make a call fail with."""


def inner_parts(processor):
    """Where a call can be interrupted: object, method, whether its work is done before."""
    session = next(iter(processor._sessions.values()), None)
    yield processor.vocabulary, "project", False
    yield processor._context, "read", True
    yield processor._context, "_advance", False
    if session is not None:
        for done in (False, True):
            yield session._decoder, "logits", done
            yield session._decoder, "resize", done
            yield session._decoder, "copy", done
        yield session, "_gather", True
        yield session._planner, "plan", True
        yield session._planner, "hold", False


def interrupt(processor, number, ids, scores):
    """Calls with one part failing; says whether the part was reached."""
    parts = list(inner_parts(processor))
    owner, name, done = parts[number % len(parts)]
    inner, countdown = getattr(owner, name), [number // len(parts) % 3]

    def fail(*arguments, **keywords):
        if countdown[0] > 0:
            countdown[0] -= 1
            return inner(*arguments, **keywords)
        if done:
            inner(*arguments, **keywords)
        raise BrokenError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        try:
            processor(ids, scores)
        except BrokenError:
            return True
    return False


def new_rows(world, rows, n):
    text = world.texts[n % len(world.texts)]
    return [text, (world.token(n),), text[: 1 + n % len(text)], *rows][:4]


# What the rows of the next call are, by those of the last one and a number.
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
    # Other ends than those that are remembered, so that what was there is overwritten.
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
        ("sentencepiece_tokenizer", "product"),
        ("sentencepiece_tokenizer", "mixture"),
    ],
)
def test_no_history_changes_a_number(pristine, request, vocabulary, config):
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
    """Rows that are remembered, and rows that share their beginnings and take their places."""
    start = world.texts[0]
    rows = [world.texts[2][:3], (*start, 20, 21)]
    # Of one length, as there is a vocabulary without padding.
    other = [(*start, 30, 31), (*start, 33, 34), (*world.texts[4], 35)[: len(start) + 2]]
    return rows, [row for row in other if len(row) == len(start) + 2]


@pytest.mark.parametrize("vocabulary", ["byte_tokenizer", "other_tokenizer"])
@pytest.mark.parametrize("number", range(36))
def test_an_interrupted_call_leaves_nothing_wrong(pristine, request, number, vocabulary):
    """Each part fails in turn, at once or at its second or third use, before or after its work."""
    world = World(pristine(vocabulary), request.getfixturevalue(vocabulary))
    rows, other = before_and_after(world)
    for row in rows:
        world.check([row])
    shown, ids = world.batch(other)
    interrupt(world.processor, number, ids, scores_for(shown, world.size))
    # What goes on from there is computed with the keys and values that are left; the row that
    # was read last comes first, before its place is needed.
    for row in (*rows[::-1], *other):
        world.check([(*row, 40)])
    for row in (*rows, *other):
        world.check([row])


def test_the_interruptions_happen(pristine, request):
    """Of the parts above, all are reached by such a call: none of those tests is empty."""
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
def test_neighbours_do_not_matter(pristine, request, vocabulary):
    """Rows with NaN, +inf, nothing allowed, only padding or ids of no token change no other."""
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


# Threads, and calls inside of calls


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
    """Six threads, three processors, one calibrator; one more copies and resets meanwhile."""
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
    """At each step of one ``generate``, runs a whole other one with the same processor."""

    def __init__(self, run):
        self.run = run
        self.results = []

    def __call__(self, input_ids, scores):
        self.results.append(self.run())
        return scores


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}], ids=str
)
def test_generate_inside_of_generate(pristine, request, make_llama, how):
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


# Memory


def live_tensors():
    """Bytes of all storages that Python can reach, each counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("in_threads", [False, True], ids=["one thread", "a thread each"])
def test_memory_stays_flat_over_a_days_calls_in_miniature(
    pristine, request, monkeypatch, in_threads
):
    """Ever new texts; every memo is smaller here, so that all of them are full after a while."""
    monkeypatch.setattr("fusion_detox.context._ENTRIES", 64)
    monkeypatch.setattr("fusion_detox.vocabulary_healing._MOST_TABLES", 64)
    monkeypatch.setattr("fusion_detox.session._MEMO_ENTRIES", 16)
    tokenizer = request.getfixturevalue("other_tokenizer")
    processor = copy.deepcopy(fresh(pristine("other_tokenizer")))
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
    # 200 rows a measurement: two tensors kept for each would be 200 * 2 * 400 * 4 bytes.
    assert max(sizes) - min(sizes) < 300_000, sizes
    # What was there before counts once it is replaced, hence from the second measurement on.
    assert abs(python[2] - python[1]) < 100_000, python
    (session,) = processor._sessions.values()
    assert len(session._planner) <= 256
    assert len(processor._context._memo) <= 64


def test_every_memo_has_a_bound_in_bytes(pristine, request):
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
    # All of one call, which the next step needs, and never more than the bytes allowed.
    assert memo.bytes <= 256 * 2**20
    blocks = {id(e.block): e.block.values.nbytes for e in memo._entries.values()}
    assert memo.bytes == sum(blocks.values())
    assert len(processor._context._memo) <= 4096
    assert len(processor.vocabulary._tables._tables) <= 2048
    before, freed = live_tensors(), memo.bytes
    assert freed > 250 * 5 * size * 4
    del memo, blocks
    processor.reset()
    assert before - live_tensors() >= freed


def test_the_text_memo_counts_what_it_keeps(pristine, request, monkeypatch):
    """Long rows are forgotten sooner: ids and path of all of them together have a bound."""
    monkeypatch.setattr("fusion_detox.context._ENTRY_IDS", 2**16)
    tokenizer = request.getfixturevalue("other_tokenizer")
    context = copy.copy(pristine("other_tokenizer")._context)
    row = tuple(tokenizer(" ".join(TEXTS) * 6, add_special_tokens=False)["input_ids"])
    assert len(row) > 500
    tracemalloc.start()
    try:
        for number in range(300):
            # As from a tensor: every row has numbers of its own.
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


# What stays as it was


def digest(model):
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        sha.update(f"{name} {tensor.dtype} {tensor.requires_grad} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        sha.update(f"{name} {module.training} {list(map(len, hooks))}".encode())
    sha.update(model.config.to_json_string().encode())
    sha.update(model.generation_config.to_json_string().encode())
    return sha.hexdigest()


def surroundings():
    """What belongs to the caller or to the whole process, by name."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "torch's random state": hashlib.sha256(torch.get_rng_state().numpy()).hexdigest(),
        "numpy's random state": hashlib.sha256(np.random.get_state()[1]).hexdigest(),  # noqa: NPY002
        "python's random state": hash(random.getstate()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "verbosity": transformers_logging.get_verbosity(),
        "progress bars": transformers_logging.is_progress_bar_enabled(),
        "log levels": {
            name: logging.getLogger(name).level for name in ("", "torch", "fusion_detox")
        },
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "threads running": threading.active_count(),
    }


# Which draws random numbers.
NO_DROPOUT = {
    "make_llama": {},
    "make_gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("family", ["make_llama", "make_gpt2"])
def test_target_calibrator_and_process_are_left_as_they_were(
    request, pristine, tmp_path, family, training
):
    """Built, used in each mode, failed, copied, saved, loaded: no bit of theirs changes."""
    tokenizer = copy.deepcopy(request.getfixturevalue("other_tokenizer"))
    model = request.getfixturevalue(family)(len(tokenizer), seed=6, **NO_DROPOUT[family]).train(
        training
    )
    calibrator = copy.deepcopy(pristine("other_tokenizer").calibrator)
    calibrator.save_pretrained(tmp_path / "saved")
    model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "pad_token_id": 0}
    # What transformers itself sets up at the first use is not ours.
    model.generate(ids, do_sample=False, **common)

    def state():
        return {
            "target": digest(model),
            "clean": digest(calibrator.clean),
            "reference": digest(calibrator.reference),
            "target's tokenizer": tokenizer.backend_tokenizer.to_str(),
            "calibrator's tokenizer": calibrator.tokenizer.backend_tokenizer.to_str(),
            "record": json.dumps(calibrator.record),
            **surroundings(),
        }

    before = state()
    processor = FusionLogitsProcessor(calibrator, tokenizer, CONTRAST)
    Calibrator.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    for how in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}):
        model.generate(ids, do_sample=False, logits_processor=[processor], **how, **common)
    scores = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(0))
    processor.with_strength(ids, scores)
    with pytest.raises(VocabularyError):
        processor(ids, torch.zeros(1, 9000))
    interrupt(processor, 1, ids, scores)
    pickle.loads(pickle.dumps(processor))(ids, scores)
    copy.deepcopy(processor)(ids, scores)
    processor.reset()
    after = state()
    assert {name for name in before if before[name] != after[name]} == set()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_results_carry_no_graph_and_no_inference_tensors(pristine):
    """Scores that require gradients, and a first call in inference mode, work before training."""
    processor = fresh(pristine("other_tokenizer"))
    ids = torch.tensor([[20, 21, 22]])
    width = len(processor.vocabulary.mapped)
    with torch.inference_mode():
        first = processor(ids, scores_for([(1,)], width))
    scores = scores_for([(1,)], width).requires_grad_()
    with torch.enable_grad():
        second = processor(ids, scores)
    torch.testing.assert_close(first, second.detach(), **EXACT)
    second[0, 30].backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(
    "vocabulary",
    [
        "byte_tokenizer",
        "other_tokenizer",
        "sentencepiece_tokenizer",
    ],
)
def test_autocast_of_the_caller_does_not_matter(pristine, request, vocabulary):
    tokenizer = request.getfixturevalue(vocabulary)
    world = World(pristine(vocabulary), tokenizer)
    rows = [world.texts[0][:3], world.texts[2][:3], world.texts[3][:3]]
    world.check(rows)
    longer = [(*row, 20) for row in rows]
    wanted = [world.wanted(row) for row in longer]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = world.processor(torch.tensor(longer), scores_for(longer, world.size))
    torch.testing.assert_close(found, torch.stack(wanted), **EXACT)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        ("byte_tokenizer", torch.float64),
        ("byte_tokenizer", torch.bfloat16),
        ("other_tokenizer", torch.float64),
        ("other_tokenizer", torch.bfloat16),
    ],
)
def test_the_default_dtype_does_not_matter(pristine, request, vocabulary, dtype):
    """Loading a model sets it for the whole process, so another thread may meet any."""
    tokenizer = request.getfixturevalue(vocabulary)
    world = World(pristine(vocabulary), tokenizer)
    row = world.texts[0]
    wanted, scores = world.wanted(row), scores_for([row], world.size)
    torch.set_default_dtype(dtype)
    try:
        built = FusionLogitsProcessor(world.pristine.calibrator, tokenizer, CONTRAST)
        found = built(torch.tensor([row]), scores)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found[0], wanted, **EXACT)


def test_a_map_that_is_built_in_autocast_is_no_other(pristine, request, monkeypatch, tmp_path):
    """It is kept on disk, for processes that know nothing of it."""
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path))
    tokenizer = request.getfixturevalue("other_tokenizer")
    wanted = pristine("other_tokenizer").vocabulary._static
    with torch.autocast("cpu", dtype=torch.bfloat16):
        built = FusionLogitsProcessor(pristine("other_tokenizer").calibrator, tokenizer, CONTRAST)
    for name, tensor in built.vocabulary._static.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_no_nan_is_added_to_rows_without_a_law(pristine, value):
    """Scores without a softmax come back as they are, for the caller to find."""
    processor = fresh(pristine("other_tokenizer"))
    scores = scores_for([(1,), (2,)], len(processor.vocabulary.mapped))
    scores[0, 7 if value > 0 else slice(None)] = value
    found = processor(torch.tensor([[20, 21], [20, 22]]), scores)
    assert torch.equal(found[0], scores[0])


def test_quiet_loading_in_threads_restores_what_was_before():
    """Left in the order in which they were entered, which nesting never does."""
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    first, second = quiet_transformers(), quiet_transformers()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert transformers_logging.get_verbosity() == logging.CRITICAL
    second.__exit__(None, None, None)
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before


# Determinism


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("vocabulary", ["other_tokenizer", "sentencepiece_tokenizer"])
def test_the_same_text_in_any_batch(pristine, request, make_llama, vocabulary, how):
    """Alone, together, in another order, twice, and with more padding."""
    tokenizer = request.getfixturevalue(vocabulary)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    size = len(tokenizer)
    model = make_llama(size, seed=6, eos_token_id=None, max_position_embeddings=128)
    processor = FusionLogitsProcessor(
        pristine(vocabulary).calibrator, tokenizer, CONTRAST, pad_token_id=pad
    )
    texts = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]

    def write(rows, padding=0):
        width = max(map(len, rows)) + padding
        found = model.generate(
            torch.tensor([(pad,) * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=pad,
            logits_processor=[processor],
            **how,
        )
        return [tuple(row[width:]) for row in found.tolist()]

    alone = [write([text])[0] for text in texts]
    assert len(set(alone)) > 2
    assert write(texts) == alone
    assert write(texts[::-1]) == alone[::-1]
    assert write(texts[1:3] + texts[1:3], padding=5) == alone[1:3] * 2
    assert write(texts[3:], padding=11) == alone[3:]


def test_the_same_seed_the_same_text(pristine, request, make_llama):
    """Sampling: twice in a row, after other calls, and (row by row) in any batch."""
    tokenizer = request.getfixturevalue("other_tokenizer")
    model = make_llama(len(tokenizer), seed=6, eos_token_id=None)
    model.generation_config.eos_token_id = None
    processor = fresh(pristine("other_tokenizer"))
    ids = tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"].repeat(3, 1)

    def sample(seed, processor=processor):
        torch.manual_seed(seed)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=8,
            pad_token_id=0,
            logits_processor=[processor],
        ).tolist()

    first = sample(1)
    assert sample(2) != first
    assert sample(1) == first
    assert sample(1, fresh(processor)) == first
    processor.reset()
    assert sample(1) == first

    def rows(pending, size):
        sampling = Sampling(max_new_tokens=8, samples=2, seed=5)
        return {
            (row.job.index, row.job.sample): row.completion.token_ids
            for row in generate_rows(
                model, tokenizer, pending, sampling, processor=processor, batch_size=size
            )
        }

    pending = jobs(TEXTS[:4], 2)
    together = rows(pending, 8)
    assert len(set(together.values())) > 4
    assert rows(pending, 1) == together
    assert rows(pending[::-1], 3) == together
    half = rows(pending[1::2], 4)
    assert half == {key: together[key] for key in half}
