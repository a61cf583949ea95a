"""Vocabulary maps: properties of each mode, healing against enumeration, and the disk cache."""

import copy
import gzip
import itertools
import json
import logging
import multiprocessing
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusion_detox.errors import VocabularyError
from fusion_detox.vocabulary import map as vocabulary_map
from fusion_detox.vocabulary.map import Cover, Distributions, VocabularyMap
from fusion_detox.vocabulary.token_table import ENGLISH, TokenTable

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
PUBLISHED = ("gpt2", "cl100k_base", "o200k_base", "mistral_v1_sentencepiece", "tekken")


def stand_in(tokenizer, model):
    """The attributes of a calibrator that the map reads."""
    tokens = TokenTable.from_tokenizer(tokenizer)
    return SimpleNamespace(
        tokenizer=tokenizer,
        tokens=tokens,
        clean=model,
        vocabulary_size=len(tokens.token_bytes),
        bos_id=tokenizer.bos_token_id or 0,
    )


@pytest.fixture
def own(byte_tokenizer, make_llama):
    return stand_in(byte_tokenizer, make_llama(len(byte_tokenizer)))


@pytest.fixture(params=["other_tokenizer", "sentencepiece_tokenizer"])
def target(request):
    return request.getfixturevalue(request.param)


def build(calibrator, tokenizer, **options):
    options = {"use_cache": False} | options
    return VocabularyMap.build(
        calibrator, TokenTable.from_tokenizer(tokenizer), tokenizer, **options
    )


def distributions(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)


def byte_level(merges, added=()):
    """Byte-level BPE with the given merges, ids from 0: bytes, then merged tokens."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += list(dict.fromkeys(left + right for left, right in merges))
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class LastTokenModel(torch.nn.Module):
    """A language model whose next token depends only on the previous one."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table.log())

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.table[input_ids])


def some_covers(own, rows, seed=0):
    """Per row, the cover without a remainder, and some whose remainders begin calibrator tokens."""
    token_bytes = [
        token for token in own.tokens.token_bytes if token is not None and len(token) > 2
    ]
    covers = []
    for row in range(rows):
        covers.append(Cover(row, row, b""))
        for n in range(row % 4):
            token = token_bytes[(seed + 7 * row + n) % len(token_bytes)]
            covers.append(Cover(row, rows + (row + n) % 3, token[: n + 1]))
    weights = torch.rand(2, len(covers), generator=torch.Generator().manual_seed(seed)) + 0.1
    return covers, weights


# --- identity


def test_identity_returns_exactly_the_probabilities(own, byte_tokenizer):
    found = build(own, byte_tokenizer)
    assert found.kind == "identity"
    assert found.coverage == 1.0
    assert found.mapped.tolist() == [token is not None for token in own.tokens.token_bytes]
    probs = distributions(2, 3, own.vocabulary_size)
    covers = [Cover(0, 2, b""), Cover(1, 0, b""), Cover(2, 0, b"")]
    for mode in ("prefix", "transfer"):
        result = found.project(probs, covers, torch.ones(2, 3), 3, mode=mode)
        assert torch.equal(result, probs[:, [2, 0, 0]])


def test_identity_with_padding_on_either_side(byte_tokenizer, make_llama):
    wider = copy.deepcopy(byte_tokenizer)
    wider.add_special_tokens({"pad_token": "<pad>", "cls_token": "<cls>"})
    small, large = len(byte_tokenizer), len(wider)
    probs = distributions(2, 1, large)

    found = build(stand_in(byte_tokenizer, make_llama(small)), wider)
    assert found.kind == "identity"
    assert found.mapped.tolist() == [False] + [True] * (small - 1) + [False, False]
    result = found.project(
        probs[..., :small], [Cover(0, 0, b"")], torch.ones(2, 1), 1, mode="prefix"
    )
    assert torch.equal(result[..., :small], probs[..., :small])
    assert result[..., small:].eq(0).all()
    assert result.shape == (2, 1, large)

    found = build(stand_in(wider, make_llama(large)), byte_tokenizer)
    assert found.kind == "identity"
    result = found.project(probs, [Cover(0, 0, b"")], torch.ones(2, 1), 1, mode="prefix")
    assert torch.equal(result, probs[..., :small])


def test_a_head_narrower_than_the_tokenizer(own, byte_tokenizer):
    own.vocabulary_size -= 30
    found = build(own, byte_tokenizer)
    assert found.kind == "projection"
    assert found.coverage == 1.0


def test_an_extra_text_token_is_not_padding(own, byte_tokenizer):
    wider = copy.deepcopy(byte_tokenizer)
    wider.add_tokens(["<tool>"])
    assert build(own, wider).kind == "projection"


# --- projection


def test_transfer_sums_to_one(own, target):
    found = build(own, target)
    assert found.kind == "projection"
    assert found.coverage > 0.99
    static = found._static
    columns = torch.zeros(own.vocabulary_size)
    columns.index_add_(0, static["transfer_ids"].long(), static["transfer_values"])
    known = torch.tensor([token is not None for token in own.tokens.token_bytes])
    assert torch.allclose(columns, known.float(), atol=1e-6)
    assert static["transfer_values"].min() >= 0
    assert static["prefix_values"].max() <= 1

    probs = distributions(2, 20, own.vocabulary_size)
    covers, weights = some_covers(own, 16)
    mass = found.project(probs, covers, weights, 16, mode="transfer")
    assert mass.shape == (2, 16, len(target))
    assert torch.allclose(mass.sum(-1), torch.ones(2, 16), atol=1e-5)
    assert mass[..., ~found.mapped].eq(0).all()


def test_a_prefix_mass_never_grows_with_more_bytes(own, target):
    found = build(own, target)
    token_bytes = TokenTable.from_tokenizer(target).token_bytes
    pairs = [
        (short, long)
        for (short, a), (long, b) in itertools.permutations(enumerate(token_bytes), 2)
        if a is not None and b is not None and b.startswith(a)
    ]
    assert len(pairs) > 100
    short, long = torch.tensor(pairs).t()
    for seed in range(3):
        probs = distributions(2, 20, own.vocabulary_size, seed=seed)
        covers, weights = some_covers(own, 16, seed)
        mass = found.project(probs, covers, weights, 16, mode="prefix")
        assert mass.min() >= 0
        assert mass.max() <= 1 + 1e-5
        assert (mass[..., long] <= mass[..., short] * (1 + 1e-5)).all()


def test_normal_tokens_before_their_byte_twins(own, sentencepiece_tokenizer):
    found = build(own, sentencepiece_tokenizer)
    at = sentencepiece_tokenizer.convert_tokens_to_ids
    normal, twin, only = at("a"), at("<0x61>"), at("<0xE6>")
    probs = distributions(1, 1, own.vocabulary_size)
    arguments = (probs, [Cover(0, 0, b"")], torch.ones(1, 1), 1)
    mass = found.project(*arguments, mode="transfer")[0, 0]
    assert mass[normal] > 0
    assert mass[twin] == 0
    assert mass[only] > 0
    mass = found.project(*arguments, mode="prefix")[0, 0]
    assert mass[normal] == mass[twin] > 0
    # Also inside a word: a calibrator token whose target tokenisation ends with a single letter.
    token_bytes = TokenTable.from_tokenizer(sentencepiece_tokenizer).token_bytes
    splits = TokenTable.from_tokenizer(sentencepiece_tokenizer).split(
        sentencepiece_tokenizer, [token or b"\xff" for token in own.tokens.token_bytes]
    )
    own_id, split = next(
        (j, split)
        for j, split in enumerate(splits)
        if split
        and len(split) == 2
        and len(token_bytes[split[1]]) == 1
        and token_bytes[split[1]].isalpha()
    )
    normal, twin = split[1], at(f"<0x{token_bytes[split[1]][0]:02X}>")
    certain = torch.zeros(1, 1, own.vocabulary_size).index_fill(2, torch.tensor(own_id), 1.0)
    for mode, wanted in (("transfer", 0.0), ("prefix", 1.0)):
        covers = [Cover(0, 0, token_bytes[split[0]])]
        mass = found.project(certain, covers, torch.ones(1, 1), 1, mode=mode)[0, 0]
        assert mass[normal] == 1.0
        assert mass[twin] == wanted


def test_static_factors_of_long_tokens(make_llama):
    # The target has the tokens "abcd" and "abce"; the calibrator splits them as ab|cd and ab|ce.
    mine = byte_level([("a", "b"), ("c", "d"), ("c", "e")])
    theirs = byte_level([("a", "b"), ("c", "d"), ("c", "e"), ("ab", "cd"), ("ab", "ce")])
    own = stand_in(mine, make_llama(len(mine)))
    found = build(own, theirs)
    ab, cd, ce, c = mine.convert_tokens_to_ids(["ab", "cd", "ce", "c"])
    with torch.no_grad():
        after = own.clean(torch.tensor([[own.bos_id, ab]])).logits[0, -1].softmax(-1)
    probs = distributions(1, 1, own.vocabulary_size)
    p = probs[0, 0]
    for mode in ("transfer", "prefix"):
        mass = found.project(probs, [Cover(0, 0, b"")], torch.ones(1, 1), 1, mode=mode)[0, 0]
        long = mass[theirs.convert_tokens_to_ids(["abcd", "abce"])]
        assert torch.allclose(long, p[ab] * after[[cd, ce]], rtol=1e-4)
        rest = p[ab] - long.sum() if mode == "transfer" else p[ab]
        assert torch.allclose(mass[theirs.convert_tokens_to_ids("ab")], rest, rtol=1e-4)
    assert after[c] > 0


def test_a_row_does_not_depend_on_its_neighbours(own, target):
    found = build(own, target)
    probs = distributions(2, 20, own.vocabulary_size)
    covers, weights = some_covers(own, 16)
    for mode in ("prefix", "transfer"):
        together = found.project(probs, covers, weights, 16, mode=mode)
        for row in range(16):
            mine = [n for n, cover in enumerate(covers) if cover.row == row]
            alone = found.project(
                probs,
                [covers[n]._replace(row=0) for n in mine],
                weights[:, mine],
                1,
                mode=mode,
            )
            assert torch.allclose(alone[:, 0], together[:, row], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dense", [(0, 0), (32, 0), (32, 8)])
@pytest.mark.parametrize("mode", ["prefix", "transfer"])
def test_gathered_columns_are_those_of_the_whole_projection(own, target, mode, dense, monkeypatch):
    monkeypatch.setattr(vocabulary_map, "_DENSE_TOKENS", dense[0])
    monkeypatch.setattr(vocabulary_map, "_DENSE_FROM", dense[1])
    found = build(own, target)
    probs = distributions(2, 20, own.vocabulary_size)
    covers, weights = some_covers(own, 16)
    del covers[0]  # a row that ends inside a character
    weights = weights[:, 1:]
    wanted = found.project(probs, covers, weights, 16, mode=mode)
    generator = torch.Generator().manual_seed(4)
    size = len(found.mapped)
    for width, share in ((size, 0.02), (size + 9, 0.5), (size - 3, 1.0), (size, 0.0)):
        reached = found.mapped[:width]
        reached = torch.nn.functional.pad(reached, (0, width - len(reached)))
        chosen = reached & (torch.rand(16, width, generator=generator) < share)
        places = chosen.view(-1).nonzero().view(-1)
        if not len(places):
            places = torch.zeros(1, dtype=torch.long)
        got = found.gather(Distributions.of(probs), covers, weights, places, (16, width), mode=mode)
        columns = wanted[:, places // width, places % width]
        torch.testing.assert_close(got, columns, rtol=2e-6, atol=1e-12)


def test_only_proportions_of_weights_matter_and_inputs_are_unchanged(own, other_tokenizer):
    found = build(own, other_tokenizer)
    probs = distributions(2, 20, own.vocabulary_size)
    covers, weights = some_covers(own, 16)
    before = probs.clone(), weights.clone()
    mass = found.project(probs, covers, weights, 16, mode="prefix")
    smaller = found.project(probs, covers, weights * 1e-6, 16, mode="prefix")
    assert torch.allclose(mass, smaller, rtol=1e-4)
    assert torch.equal(probs, before[0])
    assert torch.equal(weights, before[1])
    assert mass.dtype == torch.float32


def test_text_that_ends_inside_a_character(own, other_tokenizer):
    """If the text ends with the first byte of a character, every cover has a remainder."""
    found = build(own, other_tokenizer)
    first = "é".encode()[:1]
    probs = distributions(1, 1, own.vocabulary_size)
    mass = found.project(probs, [Cover(0, 0, first)], torch.ones(1, 1), 1, mode="transfer")[0, 0]
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-5)
    token_bytes = TokenTable.from_tokenizer(other_tokenizer).token_bytes
    # The next token continues the character.
    assert all(0x80 <= token_bytes[i][0] < 0xC0 for i in mass.nonzero()[:, 0].tolist())


def test_a_text_that_no_calibrator_token_continues(own, other_tokenizer):
    found = build(own, other_tokenizer)
    probs = distributions(1, 1, own.vocabulary_size)
    for mode in ("prefix", "transfer"):
        mass = found.project(probs, [Cover(0, 0, b"\x01zzz")], torch.ones(1, 1), 1, mode=mode)
        assert mass.eq(0).all()


# --- healing against enumeration

WORDS = ["Ġa", "Ġab", "Ġabc", "Ġabd", "Ġb"]
MERGES = [("Ġ", "a"), ("Ġ", "b"), ("Ġa", "b"), ("Ġab", "c"), ("Ġab", "d")]


def word_model():
    """A calibrator that writes whole words only, each drawn independently."""
    tokenizer = byte_level(MERGES)
    distribution = torch.zeros(len(tokenizer))
    distribution[tokenizer.convert_tokens_to_ids(WORDS)] = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25])
    return stand_in(tokenizer, LastTokenModel(distribution.repeat(len(tokenizer), 1))), distribution


def exact_next_byte(distribution, tokenizer, text):
    """Next-byte distribution after a text, from all sequences of words that begin with it."""
    words = {
        word.replace("Ġ", " "): distribution[tokenizer.convert_tokens_to_ids(word)]
        for word in WORDS
    }
    found = dict.fromkeys(" abcd", 0.0)

    def extend(written, probability):
        if len(written) > len(text):
            found[written[len(text)]] += float(probability)
            return
        for word, p in words.items():
            longer = written + word
            if longer.startswith(text) or text.startswith(longer):
                extend(longer, probability * p)

    extend("", 1.0)
    total = sum(found.values())
    return {byte: p / total for byte, p in found.items()}


def covers_of(calibrator, distribution, text):
    """The covers of a text whose last word is one calibrator token."""
    last = text[text.rindex(" ") :]
    token = calibrator.tokenizer.convert_tokens_to_ids(last.replace(" ", "Ġ"))
    weights = torch.tensor([[distribution[token], 1.0]])
    return [Cover(0, 0, b""), Cover(0, 0, last.encode())], weights


@pytest.mark.parametrize("mode", ["prefix", "transfer"])
@pytest.mark.parametrize("text", [" a", " ab", " b a", " ab ab", " abc"])
def test_healing_gives_the_exact_next_byte_distribution(mode, text):
    calibrator, distribution = word_model()
    bytes_only = byte_level([])
    found = build(calibrator, bytes_only)
    covers, weights = covers_of(calibrator, distribution, text)
    mass = found.project(distribution[None, None], covers, weights, 1, mode=mode)[0, 0]
    wanted = exact_next_byte(distribution, calibrator.tokenizer, text)
    names = [byte.replace(" ", "Ġ") for byte in wanted]
    got = mass[bytes_only.convert_tokens_to_ids(names)].tolist()
    assert got == pytest.approx(list(wanted.values()), abs=1e-6)


def test_healing_counts_only_tokens_with_a_target_boundary_there():
    calibrator, distribution = word_model()
    # The target has " ab" and " abc", so "c" never follows " ab"; "d" is a token of its own.
    coarse = byte_level([merge for merge in MERGES if merge[1] != "d"])
    found = build(calibrator, coarse)
    covers, weights = covers_of(calibrator, distribution, " ab")
    space, c, d = coarse.convert_tokens_to_ids(["Ġa", "c", "d"])
    for mode in ("prefix", "transfer"):
        mass = found.project(distribution[None, None], covers, weights, 1, mode=mode)[0, 0]
        assert mass[c] == 0
        assert mass[d].item() == pytest.approx(0.15 / (0.3 + 0.15))
        assert mass[space] > 0


# --- coverage


def test_too_little_coverage_is_refused(own):
    names = ["[UNK]", "the", "a", "it"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    with (
        pytest.warns(UserWarning, match="approximate"),
        pytest.raises(VocabularyError, match=r"only \d\.\d\d% .* at least 98\.00% .* Train a cal"),
    ):
        build(own, words)
    with pytest.warns(UserWarning, match="approximate"):
        assert 0 < build(own, words, minimum_coverage=0.0).coverage < 0.2


def test_the_english_sample_is_long_enough():
    assert len(ENGLISH) > 1500
    assert ENGLISH.isascii()


# --- disk cache


def same(first, second):
    assert first._static.keys() == second._static.keys()
    return all(torch.equal(first._static[name], second._static[name]) for name in first._static)


def test_cache(own, other_tokenizer, sentencepiece_tokenizer, make_llama, tmp_path):
    built = build(own, other_tokenizer, use_cache=True, cache_dir=tmp_path)
    loaded = build(own, other_tokenizer, use_cache=True, cache_dir=tmp_path)
    assert (built.from_cache, loaded.from_cache) == (False, True)
    assert same(built, loaded)
    assert loaded.coverage == built.coverage
    assert torch.equal(loaded.mapped, built.mapped)
    # Each target and each model has its own map.
    assert not build(own, sentencepiece_tokenizer, use_cache=True, cache_dir=tmp_path).from_cache
    own.clean = make_llama(own.vocabulary_size, seed=5)
    assert not build(own, other_tokenizer, use_cache=True, cache_dir=tmp_path).from_cache
    assert len(list(tmp_path.iterdir())) == 3


def test_cache_folder_from_the_environment(own, other_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "named"))
    build(own, other_tokenizer, use_cache=True)
    assert len(list((tmp_path / "named").iterdir())) == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    save_file({"x": torch.zeros(1)}, path)


def another_pair(path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"key": "0"})


def shifted(path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["prefix_ptr"] = tensors["prefix_ptr"] + 1
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("damage", [truncate, empty, foreign, another_pair, shifted])
def test_a_damaged_cache_file_is_rebuilt(own, other_tokenizer, tmp_path, damage, caplog):
    built = build(own, other_tokenizer, use_cache=True, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = build(own, other_tokenizer, use_cache=True, cache_dir=tmp_path)
    assert "is rebuilt" in caplog.text
    assert not again.from_cache
    assert same(built, again)
    assert build(own, other_tokenizer, use_cache=True, cache_dir=tmp_path).from_cache
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_cache_is_only_logged(own, other_tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = build(own, other_tokenizer, use_cache=True, cache_dir=tmp_path / "file" / "maps")
    assert "FUSION_DETOX_CACHE" in caplog.text
    assert found.kind == "projection"


def _build_in_process(arguments):
    own, tokenizer, folder = arguments
    torch.set_num_threads(1)
    found = build(own, tokenizer, use_cache=True, cache_dir=folder)
    return found.from_cache, found._static["prefix_values"].sum().item()


def test_processes_that_build_concurrently(own, other_tokenizer, tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(_build_in_process, [(own, other_tokenizer, tmp_path)] * 4, chunksize=1)
    assert len({total for _, total in results}) == 1
    assert build(own, other_tokenizer, use_cache=True, cache_dir=tmp_path).from_cache
    assert len(list(tmp_path.iterdir())) == 1


def test_pickle_and_deepcopy(own, other_tokenizer):
    found = build(own, other_tokenizer)
    probs = distributions(2, 20, own.vocabulary_size)
    covers, weights = some_covers(own, 16)
    wanted = found.project(probs, covers, weights, 16, mode="prefix")
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert torch.equal(other.project(probs, covers, weights, 16, mode="prefix"), wanted)


# --- published vocabularies


@pytest.fixture(scope="module")
def eight_thousand(make_llama):
    data = SHARED / "data" / "web_posts.jsonl.gz"
    if not data.exists():
        pytest.skip(f"{data} is missing")
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 1500)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=8192,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>")
    return stand_in(fast, make_llama(len(fast)))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vocabularies(eight_thousand, name, tmp_path):
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    # From tokenizer.json alone: transformers 4 cannot read the class names of transformers 5.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokens = TokenTable.from_tokenizer(tokenizer)
    built = VocabularyMap.build(eight_thousand, tokens, tokenizer, cache_dir=tmp_path)
    loaded = VocabularyMap.build(eight_thousand, tokens, tokenizer, cache_dir=tmp_path)
    assert built.kind == "projection"
    assert built.coverage >= 0.999
    assert loaded.from_cache
    assert loaded.build_seconds < built.build_seconds
    assert torch.equal(
        built.mapped, torch.tensor([token is not None for token in tokens.token_bytes])
    )

    probs = distributions(2, 2, eight_thousand.vocabulary_size)
    covers = [Cover(0, 0, b""), Cover(0, 1, b" stu"), Cover(1, 1, b"")]
    mass = loaded.project(probs, covers, torch.ones(2, 3), 2, mode="transfer")
    assert torch.allclose(mass.sum(-1), torch.ones(2, 2), atol=1e-4)
