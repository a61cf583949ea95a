"""Languages and scripts: any text in any tokens is read by its bytes, at every step.

The oracle joins the bytes of the target's tokens, decodes them, and has the calibrator's tokenizer
split the whole text again.
"""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor
from fusion_detox.decoding.text_context import TextContext
from fusion_detox.vocabulary.token_table import TokenTable, encode

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "tokenizers"
PUBLISHED = ["gpt2", "cl100k_base", "o200k_base", "tekken", "mistral_v1_sentencepiece"]
BUILT = ["byte_tokenizer", "other_tokenizer", "sentencepiece_tokenizer"]
CONFIG = FusionConfig(strength=1.5, plausibility=0.0, threshold=0.05)

SCRIPTS = {
    "emoji": "🙂👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪☺️1️⃣",
    "combining": "e\u0301a\u0308o\u0302\u0323Z\u0351\u0357\u0343\u035b\u0301\u0301\u0301",
    "right to left": "שלום עולם، مرحبا بالعالم\u200f \u202bאב\u202c",
    "east asian": "東京都、你好世界。カタカナ ﾊﾝｶｸ 한국어 힣",
    "indic": "नमस्ते दुनिया क्षत्रिय தமிழ் ไทยสวัสดี ខ្មែរ မြန်မာ",
    "european": "Straße ÄÖÜ ǅ ŉ İı Ελλάδα Привет, naïve café œuvre",
    "space": "a\u00a0b\u2003c\u3000d\u1680e\u202ff  \t \x0b \x0c g\x85h\u2028i\u2029j",
    "line ends": "a\r\nb\rc\n\n\n\r\n \r\n\td\n \n  \n\u2028 \n",
    "invisible": "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg\ufe0f\ufeff",
    "controls": "\x00\x01\x07\x08\x1b[0m\x7f\x00a\x00",
    "code": "def f(x):\n\tif x>=10:\n\t\treturn {'a': [1,2]}  # TODO\n\n\n",
    "digits": "1234567890 3.14159 ١٢٣ ४५६ １２３ ²³ ½ Ⅳ 1,000,000",
    "words": "don't we'LL it''s 'tis I've they're rock'n'roll",
    "long word": "a" * 300 + "Ab" * 90 + "=" * 150 + "東" * 80,
    "rare": "\U0001f9ff\U00020000\U0010ffff\ue000\ufffd\ufffe\U000e0041𝔸𝒷𝟙",
    "names of tokens": "<|endoftext|><s></s><pad><unk>[CLS]<0x41>▁▁a▁b##ing",
    "nothing": "",
}
MIXED = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(sorted(set("".join(SCRIPTS.values())))),
    ),
    max_size=40,
)
TEXT = st.one_of(
    MIXED,
    st.lists(st.one_of(st.sampled_from(list(SCRIPTS.values())), MIXED), max_size=4).map("".join),
)


def quick(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def wordpiece():
    """A tokenizer like BERT's: lower case, no accents, no spaces, all single characters."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *(f"##{c}" for c in characters)]
    names += ["the", "##ing", "東", "é", "##é", "🙂"]
    tokenizer = Tokenizer(
        models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
    )


def published(name):
    """Load from tokenizer.json: the class names in folders depend on the transformers version."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is missing")
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    if name in ("gpt2", "cl100k_base", "o200k_base"):
        ends = dict.fromkeys(ends, "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_file=str(SHARED / name / "tokenizer.json"), **ends)


@pytest.fixture(scope="module")
def kinds(request):
    """Return a tokenizer and its token table by name."""
    found = {}

    def kind(name):
        if name not in found:
            if name in BUILT:
                tokenizer = request.getfixturevalue(name)
            else:
                tokenizer = wordpiece() if name == "wordpiece" else published(name)
            tables = TokenTable.from_tokenizer
            if name == "wordpiece":
                with pytest.warns(UserWarning, match="approximate"):
                    found[name] = tokenizer, tables(tokenizer)
            else:
                found[name] = tokenizer, tables(tokenizer)
        return found[name]

    return kind


@pytest.fixture(scope="module")
def readers(kinds):
    """Return a context by the names of calibrator and target."""
    found = {}

    def reader(calibrator, target):
        if (calibrator, target) not in found:
            tokenizer, tokens = kinds(calibrator)
            found[calibrator, target] = TextContext(
                SimpleNamespace(tokenizer=tokenizer, tokens=tokens, context_length=10**6),
                kinds(target)[1],
                identity=False,
                pad_id=kinds(target)[0].pad_token_id,
            )
        return found[calibrator, target]

    return reader


class Oracle:
    """Reads a row of ids by its bytes alone."""

    def __init__(self, calibrator, target):
        (tokenizer, self.own), (self.target, self.table) = calibrator, target
        self.pad = self.target.pad_token_id
        self.plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.plain.encode_special_tokens = True

    def data(self, ids):
        while ids and ids[0] == self.pad:
            ids = ids[1:]
        for i in range(len(ids) - 1, -1, -1):
            if ids[i] in self.table.reset_ids:
                ids = ids[i + 1 :]
                break
        # Special tokens at the start of a text are ignored; later ones are line breaks.
        pieces = [None if i in self.table.special_ids else self.table.token_bytes[i] for i in ids]
        while pieces and pieces[0] is None:
            pieces = pieces[1:]
        if pieces and self.table.dummy_prefix:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(b"\n" if piece is None else piece for piece in pieces)

    def read(self, ids):
        """Return the path and the pending bytes."""
        data = self.data(list(ids))
        pending = b""
        for length in (1, 2, 3):
            # An unfinished character: bytes that further bytes would complete.
            end = data[-length:]
            if len(end) == length and _unfinished(end):
                pending = end
        text = data[: len(data) - len(pending)].decode(errors="replace")
        return tuple(self.plain.encode(text, add_special_tokens=False).ids), pending


def _unfinished(end):
    """Whether the bytes begin a UTF-8 character without completing it (Unicode, table 3-7)."""
    lead, *rest = end
    wanted = 1 if 0xC2 <= lead <= 0xDF else 2 if 0xE0 <= lead <= 0xEF else 3
    if not 0xC2 <= lead <= 0xF4 or len(rest) >= wanted:
        return False
    if any(not 0x80 <= byte <= 0xBF for byte in rest):
        return False
    least = {0xE0: 0xA0, 0xF0: 0x90}.get(lead, 0x80)
    most = {0xED: 0x9F, 0xF4: 0x8F}.get(lead, 0xBF)
    return not rest or least <= rest[0] <= most


def check_all_prefixes(reader, oracle, ids, every=1):
    """Token by token and all at once, the reader's path equals that of the whole text."""
    ids = tuple(ids)
    for end in range(0, len(ids) + 1, every):
        found = reader.read(ids[:end])
        assert (found.path, found.pending) == oracle.read(ids[:end]), (ids[:end], end)
        # The last word too, although it depends on where the whole text's words end.
        assert found == reader.read_uncached(ids[:end]), (ids[:end], end)
    assert copy.copy(reader).read(ids) == reader.read(ids)


TARGETS = [*BUILT, "wordpiece"]
CALIBRATORS = ["byte_tokenizer", "other_tokenizer", "sentencepiece_tokenizer"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_every_script_token_by_token(kinds, readers, calibrator, target):
    reader = readers(calibrator, target)
    oracle = Oracle(kinds(calibrator), kinds(target))
    for name, text in SCRIPTS.items():
        (ids,) = encode(kinds(target)[0], [text])
        check_all_prefixes(reader, oracle, ids)
        if target in ("byte_tokenizer", "other_tokenizer") and name != "names of tokens":
            assert oracle.data(ids) == text.encode()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_fuzzed_text_token_by_token(kinds, readers, calibrator, target):
    tokenizer, _ = kinds(target)
    oracle = Oracle(kinds(calibrator), kinds(target))

    @quick(30)
    @given(TEXT)
    def run(text):
        (ids,) = encode(tokenizer, [text])
        check_all_prefixes(readers(calibrator, target), oracle, ids[:120])

    run()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_fuzzed_tokens(kinds, readers, calibrator, target):
    """Ids that no text has: bytes that are not UTF-8, special tokens anywhere, padding inside."""
    size = len(kinds(target)[1].token_bytes)
    oracle = Oracle(kinds(calibrator), kinds(target))

    @quick(40)
    @given(st.lists(st.integers(0, size - 1), max_size=40))
    def run(ids):
        check_all_prefixes(readers(calibrator, target), oracle, ids)

    run()


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@pytest.mark.parametrize("target", ["byte_tokenizer", "sentencepiece_tokenizer"])
def test_fuzzed_bytes_as_byte_tokens(kinds, readers, calibrator, target):
    """Any bytes, split anywhere; both kinds of tokenizer have single bytes as tokens."""
    _, table = kinds(target)
    single = {}
    for i, piece in enumerate(table.token_bytes):
        if piece is not None and len(piece) == 1 and (i in table.byte_ids or not table.byte_ids):
            single[piece[0]] = i
    assert len(single) == 256
    oracle = Oracle(kinds(calibrator), kinds(target))
    tricky = [b"\xf0\x9f", b"\xe6\x9d\xb1", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90", b"\xff"]
    tricky += ["🙂".encode(), b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\r\n", b" ", b"a", b"\xc3"]

    @quick(60)
    @given(st.lists(st.one_of(st.sampled_from(tricky), st.binary(max_size=4)), max_size=12))
    def run(parts):
        ids = [single[byte] for byte in b"".join(parts)]
        check_all_prefixes(readers(calibrator, target), oracle, ids)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers_as_targets(kinds, readers, name):
    """Published tokenizers split emoji and rare scripts over several tokens."""
    tokenizer, table = kinds(name)
    ours = ["byte_tokenizer", "other_tokenizer"]
    oracles = {own: Oracle(kinds(own), kinds(name)) for own in ours}
    split = 0
    for number, text in enumerate(SCRIPTS.values()):
        (ids,) = encode(tokenizer, [text])
        spelled = b"".join(table.token_bytes[i] or b"" for i in ids)
        if "▁" not in text and "<" not in text:  # which tokenizers may mistake for their own tokens
            assert spelled == (b" " if table.dummy_prefix and text else b"") + text.encode()
        split += sum(_unfinished(table.token_bytes[i][-1:]) for i in ids if table.token_bytes[i])
        calibrator = ours[number % 2]
        check_all_prefixes(readers(calibrator, name), oracles[calibrator], ids)
    assert split > 5

    @quick(25)
    @given(
        st.sampled_from(ours),
        TEXT,
        st.lists(st.integers(0, len(table.token_bytes) - 1), max_size=12),
    )
    def run(calibrator, text, more):
        (ids,) = encode(tokenizer, [text])
        check_all_prefixes(readers(calibrator, name), oracles[calibrator], (ids[:60] + more)[-64:])

    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "tekken", "mistral_v1_sentencepiece"])
def test_published_tokenizers_as_calibrators(kinds, readers, name):
    """Their patterns and normalizers, with words that change when more text follows."""
    oracle = Oracle(kinds(name), kinds("byte_tokenizer"))
    reader = readers(name, "byte_tokenizer")
    for text in SCRIPTS.values():
        (ids,) = encode(kinds("byte_tokenizer")[0], [text])
        check_all_prefixes(reader, oracle, ids, every=3 if len(ids) > 200 else 1)

    @quick(25)
    @given(TEXT)
    def run(text):
        (ids,) = encode(kinds("byte_tokenizer")[0], [text])
        check_all_prefixes(reader, oracle, ids[:100])

    run()


# The processor as a whole


@pytest.fixture(scope="module")
def processors(kinds, byte_tokenizer, make_llama, tmp_path_factory):
    width = len(byte_tokenizer)
    calibrator = Calibrator(
        make_llama(width, seed=1), make_llama(width, seed=2), byte_tokenizer, context_length=32
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSION_DETOX_CACHE", str(tmp_path_factory.mktemp("maps")))
        made = {}

        def processor(name):
            if name not in made:
                if name == "wordpiece":
                    with pytest.warns(UserWarning, match="approximate"):
                        made[name] = FusionLogitsProcessor(calibrator, kinds(name)[0], CONFIG)
                else:
                    made[name] = FusionLogitsProcessor(calibrator, kinds(name)[0], CONFIG)
            return made[name]

        yield processor


def check_numbers(processor, ids, scores, every=1):
    """Nothing raises, scores are finite and normalised, and stepwise equals all at once."""
    fused = None
    for end in range(every, len(ids) + 1, every):
        fused = processor(torch.tensor([ids[:end]]), scores)
        assert torch.isfinite(fused).all()
        assert fused.exp().sum().item() == pytest.approx(1, abs=1e-3)
    if fused is None:
        return
    whole = copy.copy(processor)
    whole._sessions, whole._context = {}, copy.copy(processor._context)
    at_once = whole(torch.tensor([ids[:end]]), scores)
    torch.testing.assert_close(fused, at_once, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_scores_stay_finite_on_every_script(kinds, processors, target):
    tokenizer, table = kinds(target)
    processor = processors(target)
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(1, len(table.token_bytes), generator=generator)
    for text in SCRIPTS.values():
        (ids,) = encode(tokenizer, [text])
        check_numbers(processor, ids[:150], scores, every=7)

    @quick(15)
    @given(TEXT, st.lists(st.integers(0, len(table.token_bytes) - 1), max_size=8))
    def run(text, more):
        (ids,) = encode(tokenizer, [text])
        check_numbers(processor, (ids + more)[-20:], scores, every=2)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mistral_v1_sentencepiece"])
def test_scores_stay_finite_with_published_tokenizers(kinds, processors, name):
    tokenizer, table = kinds(name)
    processor = processors(name)
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(1, len(table.token_bytes), generator=generator)
    for text in SCRIPTS.values():
        (ids,) = encode(tokenizer, [text])
        check_numbers(processor, ids[:60], scores, every=11)


def test_exactly_the_forbidden_tokens_stay_forbidden(kinds, processors):
    """The result is ``-inf`` exactly where the input was, even after half an emoji."""
    tokenizer, table = kinds("other_tokenizer")
    processor = processors("other_tokenizer")
    (emoji,) = encode(tokenizer, ["ok \U0001f9ff"])
    scores = torch.randn(1, len(table.token_bytes), generator=torch.Generator().manual_seed(1))
    for end in range(1, len(emoji) + 1):
        for allowed in (1, 3, 200):
            masked = scores.clone()
            masked[:, allowed:] = -torch.inf
            fused = processor(torch.tensor([emoji[:end]]), masked)
            assert torch.equal(torch.isneginf(fused), torch.isneginf(masked))
            assert not torch.isnan(fused).any()
