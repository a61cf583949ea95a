"""Reading rows of target ids incrementally equals reading them from scratch."""

import copy
import pickle
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion_detox.decoding import text_context as context
from fusion_detox.decoding.text_context import Position, TextContext
from fusion_detox.generation.chat import chat_prompt
from fusion_detox.vocabulary.token_table import TokenTable

HERE = Path(__file__).resolve().parent
FAMILIES = runpy.run_path(str(HERE.parent / "family_models.py"))
SHARED = HERE.parents[2] / "shared" / "tokenizers"

# Target ids: 0..255 are bytes, special tokens follow.
BOS, EOS, PAD, USER = 256, 257, 258, 259
TURN = 260  # named by the chat template; only some tests have one
BYTES = tuple(bytes([i]) for i in range(256))
CONTRACTIONS = "('s|'S|'t|'T|'re|'rE|'Re|'RE|'ve|'vE|'Ve|'VE|'m|'M|'ll|'lL|'Ll|'LL|'d|'D)"
WHOLE = 1_000_000  # a context that no text here exceeds
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + LINES,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + LINES,
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|" + LINES,
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + LINES,
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + LINES,
}
OTHER_PATTERNS = {
    "looks far ahead": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))|\p{L}+|\s+|.",
    "long literals": r"(a1b2c3)|\p{L}+|\p{N}|\s+|.",
}
PIECES = [
    *("a", "A", "Ab", "re", "don", "'", "'s", "'LL", "1", "123", "!", "...", "/", " ", "  ", "\t"),
    *("\n", "\r\n", "\u00a0", "é", "e\u0301", "\u0301", "東", "東京", "Ǆ", "ʰ", "🙂", "👩‍👩‍👧"),
    *("<|endoftext|>", " the", " cat", "\ufffd"),
]


def target(dummy_prefix=False, **changes):
    values = {
        "token_bytes": (*BYTES, None, None, None, None),
        "special_ids": frozenset({BOS, EOS, PAD, USER}),
        "reset_ids": frozenset({BOS, EOS, PAD}),
        "dummy_prefix": dummy_prefix,
        "turn_ids": frozenset(),
    }
    return SimpleNamespace(**{**values, **changes})


def split_by(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def calibrator_of(tokenizer):
    tokens = TokenTable.from_tokenizer(tokenizer)
    return SimpleNamespace(tokenizer=tokenizer, tokens=tokens, context_length=WHOLE)


def byte_level(pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["".join(PIECES[i:] + PIECES[:i]) for i in range(len(PIECES))]
    tokenizer.train_from_iterator([*words, "  \n  \n\n don't   don't"] * 3, trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return calibrator_of(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>")
    )


@pytest.fixture(scope="module")
def contexts(sentencepiece_tokenizer):
    """A calibrator of each kind, reading bytes."""
    kinds = {name: byte_level(split_by(pattern)) for name, pattern in PATTERNS.items()}
    kinds |= {name: byte_level(split_by(pattern)) for name, pattern in OTHER_PATTERNS.items()}
    usual = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kinds["byte-level"] = byte_level(usual)
    kinds["normalised"] = byte_level(usual, normalizers.NFC())
    kinds["sentencepiece"] = calibrator_of(sentencepiece_tokenizer)
    return {name: TextContext(kind, target(), False, PAD) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def plain(contexts):
    return contexts["byte-level"]


def text_ids(text):
    return tuple(text.encode())


def as_bytes(ids):
    return torch.tensor(ids, dtype=torch.int64).numpy().tobytes()


@given(st.lists(st.sampled_from(PIECES), min_size=60, max_size=300), st.booleans(), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_front_of_a_long_text_is_dropped_in_strides(contexts, pieces, identity, data):
    """What is left lets the calibrator see the same windows, however the text was read before."""
    reader = contexts["gpt2"]
    size = data.draw(st.sampled_from([32, 33, 64]))
    calibrator = stub(reader)
    calibrator.context_length = size
    short = TextContext(calibrator, target(), identity, PAD)
    ids = tuple(id for piece in pieces for id in text_ids(piece))
    dropped = 0
    for end in range(0, len(ids) + 1, data.draw(st.integers(1, 9))):
        row = ids[:end]
        found = short.read(row if end % 2 else as_bytes(row))
        whole = short.read_uncached(row)
        assert found[1:] == whole[1:]
        lost = len(whole.path) - len(found.path)
        assert whole.path[lost:] == found.path
        assert lost % (size // 2) == 0
        assert lost == 0 or len(found.path) > size + 32
        if short._incremental if not identity else True:
            assert len(found.path) < 2 * size + 64 + 40
        dropped = max(dropped, lost)
    assert dropped or len(short.read_uncached(ids).path) < 2 * size + 64 + 40


def spelled(reader, position):
    return b"".join(reader._calibrator_token_bytes[i] for i in position.path).decode()


rows = st.lists(
    st.one_of(
        st.sampled_from(PIECES).map(text_ids),
        st.sampled_from(PIECES).map(lambda piece: text_ids(piece)[:-1]),
        st.integers(0, 262).map(lambda id: (id,)),
    ),
    max_size=14,
).map(lambda parts: tuple(id for part in parts for id in part))


@given(rows, st.integers(1, 6))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_incremental_equals_full(contexts, ids, step):
    for name, reader in contexts.items():
        for end in range(0, len(ids) + 1, step):
            assert reader.read(ids[:end]) == reader.read_uncached(ids[:end]), name


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_reading_equals_the_tokenizer(contexts, text):
    for name, reader in contexts.items():
        if "<" not in text:  # names of special tokens are text here
            expected = reader._tokenizer.encode(text, add_special_tokens=False).ids
            assert reader.read(text_ids(text)).path == tuple(expected), name


def test_only_the_end_is_tokenised_if_the_pattern_allows(contexts, monkeypatch):
    for name, reader in contexts.items():
        local = name in PATTERNS or name == "byte-level"
        assert reader._incremental == local, name
        reader.read(text_ids("word " * 50))
        (state,) = [s for ids, s in reader._memo.items() if ids == text_ids("word " * 50)]
        assert (len(state.tail) < 20) == local, name


def test_names_of_special_tokens_are_text(plain):
    position = plain.read(text_ids("a<|endoftext|>"))
    assert 0 not in position.path
    assert spelled(plain, position) == "a<|endoftext|>"


def test_characters_split_over_tokens(plain):
    emoji = "🙂".encode()
    for end in range(1, 4):
        position = plain.read((*b"ok ", *emoji[:end]))
        assert position.pending == emoji[:end]
        assert position.path == plain.read(text_ids("ok ")).path
    assert plain.read((*b"ok ", *emoji)).pending == b""
    assert spelled(plain, plain.read((*b"ok ", *emoji[:3], *b"!"))) == "ok \ufffd!"
    assert plain.read(tuple(emoji[:2])) == Position((), (), emoji[:2])


def test_the_last_word(plain):
    position = plain.read(text_ids("Hello xqzv"))
    assert b"".join(position.word) == b" xqzv"[-len(b"".join(position.word)) :]
    assert 1 <= len(position.word) <= 4
    pieces = [plain._calibrator_token_bytes[i] for i in position.path]
    assert tuple(pieces[-len(position.word) :]) == position.word
    assert b"".join(plain.read(text_ids("a b")).word) == b" b"
    assert plain.read(()) == Position((), (), b"")


def test_the_last_word_without_pre_tokens(contexts):
    reader = contexts["sentencepiece"]
    word = reader.read(text_ids("nobody wants")).word
    assert b"nobody" not in b"".join(word)
    assert len(word) <= 4


def test_padding_and_special_tokens(plain):
    hello = plain.read(text_ids("hello"))
    ids = text_ids("hello")
    for row in [
        (PAD, PAD, *ids),
        (PAD, BOS, *ids),
        (BOS, *ids),
        (*b"before", EOS, *ids),
        (BOS, USER, *ids),
        (USER, *ids),
    ]:
        assert plain.read(row) == hello
    assert spelled(plain, plain.read((BOS, *b"a", USER, *b"b"))) == "a\nb"
    assert plain.read((*ids, EOS)).path == ()
    assert plain.read((PAD, PAD)).path == ()
    # An id of a padded head is also read as a line break.
    assert spelled(plain, plain.read((*b"a", 9999, *b"b"))) == "a\nb"


def test_padding_with_an_ordinary_token_is_stripped_at_the_start_only(plain):
    reader = TextContext(
        stub(plain),
        target(),
        False,
        ord("!"),
    )
    assert spelled(reader, reader.read(text_ids("!!a!"))) == "a!"
    assert reader.read(text_ids("!!")).path == ()


def stub(reader):
    return SimpleNamespace(
        tokenizer=SimpleNamespace(backend_tokenizer=reader._tokenizer),
        tokens=SimpleNamespace(token_bytes=reader._calibrator_token_bytes, kind="byte-level"),
        context_length=WHOLE,
    )


def test_the_space_that_sentencepiece_adds_before_a_text(plain):
    reader = TextContext(stub(plain), target(dummy_prefix=True), False, None)
    assert spelled(reader, reader.read(text_ids(" a b"))) == "a b"
    assert spelled(reader, reader.read((BOS, *b"  a"))) == " a"
    assert spelled(reader, reader.read((*b" x", EOS, *b" a"))) == "a"
    for end in range(6):
        ids = text_ids("  a b")[:end]
        assert reader.read(ids) == reader.read_uncached(ids)


def test_ids_of_the_same_vocabulary_are_passed_on():
    reader = TextContext(SimpleNamespace(context_length=WHOLE), target(), True, PAD)
    assert reader.read((PAD, BOS, 7, 8)) == Position((7, 8), (), b"")
    assert reader.read((PAD, BOS, 7, 8, USER, 9)).path == (7, 8, 10, 9)
    assert reader.read((7, EOS, USER, 300, 9)).path == (9,)
    assert reader.read((7, 8)).path == (7, 8)
    no_line_break = target(token_bytes=(b"a", b"b", None), special_ids={2}, reset_ids=set())
    assert TextContext(SimpleNamespace(context_length=WHOLE), no_line_break, True, None).read(
        (0, 2, 1)
    ).path == (0, 1)


@given(st.lists(st.integers(0, 262), max_size=30), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_ids_of_the_same_vocabulary_incrementally(ids, step):
    reader = TextContext(SimpleNamespace(context_length=WHOLE), target(), True, PAD)
    for end in range(0, len(ids) + 1, step):
        row = tuple(ids[:end])
        assert reader.read(row) == reader.read_uncached(row)


def test_the_memo_is_bounded_and_not_copied(plain, monkeypatch):
    reader = copy.deepcopy(plain)
    assert len(reader._memo) == 0
    monkeypatch.setattr(context, "_ENTRIES", 5)
    for end in range(40):
        reader.read(text_ids("x" * end))
    assert len(reader._memo) == 5
    monkeypatch.setattr(context, "_ENTRY_IDS", 60)
    reader.read(text_ids("y" * 50))
    assert len(reader._memo) == 1
    assert reader._size == sum(len(i) + len(s.tail) for i, s in reader._memo.items())
    again = pickle.loads(pickle.dumps(reader))
    assert len(again._memo) == 0
    assert again.read(text_ids("y y")) == reader.read(text_ids("y y"))


SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def smollm2():
    """Its first token begins a turn, and its last token and its padding end one."""
    tokenizer = FAMILIES["TOKENIZERS"]["qwen"]()
    start, end = "<|im_start|>", "<|im_end|>"
    tokenizer.add_special_tokens({"bos_token": start, "eos_token": end, "pad_token": end})
    tokenizer.chat_template = SMOLLM2
    return tokenizer


def published(name):
    """A published vocabulary with the tokens and the template of SmolLM2."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is missing")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    tokenizer.chat_template = SMOLLM2
    return tokenizer


CHATS = {
    "smollm2": smollm2,
    **{name: FAMILIES["TOKENIZERS"][name] for name in ("qwen", "llama3", "gemma", "mistral")},
    **{
        f"published {name}": lambda name=name: published(name)
        for name in ("gpt2", "cl100k_base", "o200k_base", "tekken", "mistral_v1_sentencepiece")
    },
}


@pytest.mark.parametrize("name", CHATS)
def test_of_a_chat_the_last_request_and_the_answer_are_read(plain, name):
    tokenizer = CHATS[name]()
    tokens = TokenTable.from_tokenizer(tokenizer)
    calibrator = stub(plain)
    reader = TextContext(calibrator, tokens, False, tokenizer.pad_token_id)
    system = None if name == "mistral" else "Be kind."
    for conversation in ("Shut up, user!", ["Hello", "assistant of a user\n", "Shut up, user!"]):
        row = list(
            tokenizer(chat_prompt(tokenizer, conversation, system), add_special_tokens=False)[
                "input_ids"
            ]
        )
        assert spelled(reader, reader.read(tuple(row))).strip() == "Shut up, user!"
        row += tokenizer("assistants are", add_special_tokens=False)["input_ids"]
        read = spelled(reader, reader.read(tuple(row)))
        assert re.sub(r"\s*\n\s*", "\n", read) == "Shut up, user!\nassistants are"


@pytest.mark.parametrize("name", CHATS)
def test_plain_text_is_read_as_without_a_chat_template(plain, name):
    tokenizer = CHATS[name]()
    tokens = TokenTable.from_tokenizer(tokenizer)
    assert tokens.turn_ids
    tokenizer.chat_template = None
    before = TokenTable.from_tokenizer(tokenizer)
    assert not before.turn_ids
    assert before.fingerprint() == tokens.fingerprint(), "vocabulary maps stay valid"
    calibrator = stub(plain)
    with_template, without = (
        TextContext(calibrator, one, False, tokenizer.pad_token_id) for one in (tokens, before)
    )
    for text in ("user\nassistant\n", "  system\nYou", "\n\nHello user\n"):
        ids = tuple(tokenizer(text)["input_ids"])
        for end in range(len(ids) + 1):
            assert with_template.read(ids[:end]) == without.read(ids[:end])


turns = st.lists(
    st.one_of(
        st.just((TURN,)),
        st.sampled_from(
            ["user", "user\n", "us", "er", "assistant\n", "\n", " ", "é", "Hi", "!"]
        ).map(text_ids),
        st.sampled_from([BOS, USER, PAD]).map(lambda id: (id,)),
    ),
    max_size=12,
).map(lambda parts: tuple(id for part in parts for id in part))


@given(turns, st.integers(1, 5))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_chat_incrementally(plain, row, step):
    tokens = target(turn_ids=frozenset({TURN}), token_bytes=(*BYTES, *[None] * 5))
    calibrator = stub(plain)
    for reader in (
        TextContext(calibrator, tokens, False, PAD),
        TextContext(SimpleNamespace(context_length=WHOLE), tokens, True, PAD),
    ):
        for end in range(0, len(row) + 1, step):
            assert reader.read(row[:end]) == reader.read_uncached(row[:end])


@pytest.mark.parametrize(
    ("row", "read"),
    [
        # The answer and the request may hold the names of roles.
        ((TURN, *b"user\nuser\n", TURN, *b"\n", TURN, *b"model\nuser\n"), "user\n\nuser\n"),
        # Not a role: another word, a longer word, a word that is not alone on its line.
        ((TURN, *b"Hi"), "Hi"),
        ((TURN, *b"users\nHi"), "users\nHi"),
        ((TURN, *b"user of\nHi"), "user of\nHi"),
        ((TURN, *b"model", TURN, *b"\n\nuser"), "user"),
        # The name of a role is complete at the line break or at the next token of the template.
        ((TURN, *b"use"), ""),
        ((*b"a", TURN, *b"user"), "a\n"),
        ((*b"a", TURN, *b"user", TURN), ""),
        ((*b"a", TURN, *b"tool", TURN, *b"b"), "a\nb"),
        # Messages without text.
        ((TURN, *b"user\n", TURN, *b"\n", TURN, *b"assistant\n"), ""),
        ((*b"a", TURN, *b"\n", TURN, *b"\n", TURN, *b"b"), "a\nb"),
        # A token that begins a text still does.
        ((TURN, *b"user\na", BOS, *b"user\nb"), "user\nb"),
    ],
)
def test_markup_of_a_chat(plain, row, read):
    tokens = target(turn_ids=frozenset({TURN}), token_bytes=(*BYTES, *[None] * 5))
    calibrator = stub(plain)
    reader = TextContext(calibrator, tokens, False, PAD)
    assert spelled(reader, reader.read(row)) == read
