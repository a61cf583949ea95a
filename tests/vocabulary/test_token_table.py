"""Token tables: bytes for every kind of tokenizer, special tokens, and splitting given bytes."""

import copy
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_detox.errors import VocabularyError
from fusion_detox.vocabulary.token_table import TokenTable, encode

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizers"
TEXT = "Tabs\t and\r\n lines, NBSP\xa0, émigré, 東京 🙂 don't;   3 spaces"


def words(vocabulary, prefix="##", **settings):
    """A WordPiece tokenizer of the given words."""
    names = {name: i for i, name in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", *vocabulary])}
    tokenizer = Tokenizer(models.WordPiece(names, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=prefix)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        **settings,
    )


def spell(table, ids):
    return b"".join(table.token_bytes[i] or b"" for i in ids)


@pytest.mark.parametrize("name", ["byte_tokenizer", "other_tokenizer"])
def test_byte_level_spells_any_text(name, request):
    tokenizer = request.getfixturevalue(name)
    table = TokenTable.from_tokenizer(tokenizer)
    assert table.kind == "byte-level"
    assert not table.dummy_prefix
    assert len(table.token_bytes) == len(tokenizer)
    rng = random.Random(0)
    texts = [TEXT, *("".join(chr(rng.randrange(1, 0x3000)) for _ in range(40)) for _ in range(20))]
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        assert spell(table, ids) == text.encode()
    # Every byte has a token, even bytes that occur in no text.
    assert {bytes([byte]) for byte in range(256)} <= set(table.token_bytes)


def test_sentencepiece(sentencepiece_tokenizer):
    table = TokenTable.from_tokenizer(sentencepiece_tokenizer)
    assert table.kind == "sentencepiece"
    assert table.dummy_prefix
    assert table.byte_ids == frozenset(range(3, 259))
    assert table.token_bytes[3 + 0xE6] == b"\xe6"
    (ids,) = encode(sentencepiece_tokenizer, [TEXT])
    assert spell(table, ids) == b" " + TEXT.encode()
    space = sentencepiece_tokenizer.convert_tokens_to_ids("▁")
    assert table.token_bytes[space] == b" "


def test_metaspace_with_another_character():
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "_", "i", "t"]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never")
    table = TokenTable.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert table.token_bytes[257] == b" "
    assert not table.dummy_prefix


def test_special_and_added_tokens(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), "naïve "])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"], "pad_token": "<pad>"})
    table = TokenTable.from_tokenizer(tokenizer)
    at = tokenizer.convert_tokens_to_ids
    assert table.token_bytes[at("<tool>")] == b"<tool>"
    assert table.token_bytes[at("naïve ")] == "naïve ".encode()
    assert table.special_ids == {0, at("<|user|>"), at("<pad>")}
    assert table.reset_ids == {0, at("<pad>")}
    assert all(table.token_bytes[i] is None for i in table.special_ids)


def test_unused_and_undecodable_ids_have_no_bytes():
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: i for i, name in enumerate(names)} | {"日": 256, "it": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("i", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    table = TokenTable.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert table.token_bytes[256:] == (None, None, None, b"it")
    assert table.special_ids == frozenset()


def test_wordpiece_is_approximate_and_warns():
    tokenizer = words(["play", "##ing", ",", "[unused7]"])
    with pytest.warns(UserWarning, match="approximate"):
        table = TokenTable.from_tokenizer(tokenizer)
    assert table.kind == "wordpiece"
    assert table.token_bytes[4:] == (b" play", b"ing", b" ,", None)
    assert table.special_ids == {0, 1, 2, 3}
    assert table.reset_ids == {1, 2, 3}


def test_a_tokenizer_without_a_fast_backend():
    class Slow:
        all_special_ids = ()

    with pytest.raises(VocabularyError, match=r"Slow has no fast backend.*use_fast=True"):
        TokenTable.from_tokenizer(Slow())


def test_a_tokenizer_that_rewrites_text(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("cold", "warm")
    with pytest.raises(VocabularyError, match=r"a warm night.*not supported"):
        TokenTable.from_tokenizer(tokenizer)


def test_a_part_written_in_python(byte_tokenizer):
    class Custom:
        def pre_tokenize(self, text):
            """Do not split the text."""

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Custom())
    with pytest.raises(VocabularyError, match="cannot be serialised"):
        TokenTable.from_tokenizer(tokenizer)


def test_padding_and_truncation_of_earlier_calls_have_no_effect(byte_tokenizer):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    wanted = encode(byte_tokenizer, ["one", "one two three"])
    tokenizer(["one", "one two three"], padding=True, truncation=True, max_length=2)
    assert encode(tokenizer, ["one", "one two three"]) == wanted


def test_fingerprint(byte_tokenizer, other_tokenizer):
    table = TokenTable.from_tokenizer(byte_tokenizer)
    assert table.fingerprint() == TokenTable.from_tokenizer(byte_tokenizer).fingerprint()
    assert len(table.fingerprint()) == 64
    assert table.fingerprint() != TokenTable.from_tokenizer(other_tokenizer).fingerprint()
    longer = copy.deepcopy(byte_tokenizer)
    longer.add_special_tokens({"pad_token": "<pad>"})
    assert table.fingerprint() != TokenTable.from_tokenizer(longer).fingerprint()


@pytest.mark.parametrize("name", ["byte_tokenizer", "other_tokenizer", "sentencepiece_tokenizer"])
def test_split_matches_the_tokenizer_in_the_middle_of_a_text(name, request):
    tokenizer = request.getfixturevalue(name)
    table = TokenTable.from_tokenizer(tokenizer)
    texts = [b" stupid", b"stupid", b"pid", b" the", "é".encode(), b"\xe6\x9d", b"  two", b"a"]
    splits = table.split(tokenizer, texts)
    assert splits[5] is None  # not UTF-8
    for text, split in zip(texts, splits, strict=True):
        assert split is None or spell(table, split) == text
    assert all(splits[i] is not None for i in (0, 1, 2, 3, 4, 7))
    if table.dummy_prefix:
        (behind,) = encode(tokenizer, ["it\nstupid"])
        assert tuple(behind[-len(splits[1]) :]) == splits[1]
    else:
        assert [list(split) for split in (splits[0], splits[1])] == encode(
            tokenizer, [" stupid", "stupid"]
        )


def test_split_is_none_if_bytes_are_lost():
    tokenizer = words(["play", "##ing", "a"])
    with pytest.warns(UserWarning, match="approximate"):
        table = TokenTable.from_tokenizer(tokenizer)
    assert table.split(tokenizer, [b" playing", b"playing", b" wrong"]) == [(4, 5), None, None]


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("gpt2", "byte-level", 50257),
        ("mistral_v1_sentencepiece", "sentencepiece", 32000),
    ],
)
def test_published_tokenizers(name, kind, size):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is missing")
    # From tokenizer.json alone: transformers 4 cannot read the class names of transformers 5.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(SHARED / name / "tokenizer.json"))
    table = TokenTable.from_tokenizer(tokenizer)
    assert (table.kind, len(table.token_bytes)) == (kind, size)
    assert table.special_ids == {i for i, token in enumerate(table.token_bytes) if token is None}
    (ids,) = encode(tokenizer, [TEXT])
    assert spell(table, ids) == (b" " if table.dummy_prefix else b"") + TEXT.encode()
    assert table.split(tokenizer, [b"upid"]) == [tuple(tokenizer.convert_tokens_to_ids(["upid"]))]
