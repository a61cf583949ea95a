"""No regular expression of the package takes more than linear time, whatever text it reads."""

import ast
import contextlib
import functools
import gzip
import importlib
import json
import random
import re
import signal
from pathlib import Path

import pytest

from fusion_detox.decoding.text_context import _CONTRACTIONS
from fusion_detox.scoring.lexical import LexicalScorer
from fusion_detox.scoring.refusals import is_refusal
from fusion_detox.training.negatives.answers import _NEXT_TURN, parse_answer
from tests.test_layers import SOURCES, parse

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LENGTH = 100_000
SECONDS = 1.0  # of processor time; linear patterns take milliseconds, quadratic ones ten seconds
METHODS = {"match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer"}

# For each pattern, what it could be slow on: a unit that fills the text, or (start, unit, end).
# A new pattern needs an entry. Look for two adjacent repetitions that match the same characters,
# and for a repetition at the start of a pattern that is searched for.
WORST = {
    "alignment.embeddings:embed|wte|head|output": ["embe", "outpu"],
    "calibrator.card:[^a-z0-9.]+": ["-", "-a"],
    "calibrator.card:_HUB_ID": ["a", "a-", ("", "a", "/"), ("a/", "b", "/")],
    "calibrator.lookup:_HUB_ID": ["a", ("", "a", "/"), ("a/", "b", "/")],
    r"cli.options:^    (\w+): (.*(?:\n {5,}.*)*)": [
        "    a: b\n",
        ("    ", "a", ""),
        ("    a: b\n", " ", ""),
        ("    a: ", "b\n      ", "c"),
        "\n",
    ],
    "decoding.text_context:_CONTRACTIONS": [
        ("(", "a", ""),
        ("(?i:", "a|", "!"),
        ("(", "'a", ""),
        "(a",
        "'(",
        "(?i:a|'",
    ],
    "evaluation.metrics.diversity:_WORD": ["a'", "a", "'", ("a", "'", "")],
    "evaluation.prompts.prompt_sets:_TOXIGEN_FILE": [("hate_", "a", ""), ("hate_", "_1k", "!")],
    "evaluation.report.reading:_FORBIDDEN": ["\x00", "a"],
    "evaluation.variants:[^A-Za-z0-9.=]+": ["-", "-a"],
    r"files.cards:[\ufeff\ud800-\udfff]": ["\ufeff", "a"],
    "files.cards:`+": ["`", "` "],
    r"files.cards:\n{3,}": ["\n", "\n\n ", "\n\na"],
    r"files.config_checks:\d{1,18}": ["1"],
    "files.config_checks:_COUNTS": ["n", "num_", "moe_intermediate_", "shared_expert_"],
    "files.config_checks:_SHARES": ["dropout", "_pdrop", ("dropout", "_prob", "x")],
    "files.config_checks:_SMALL": ["_eps", "_epsilon", ("_eps", "_theta", "x")],
    "files.config_checks:_TOKENIZER_TYPES": ["add_", "_token", ("_token", "_token", "x")],
    "files.models:_MODEL_ID": ["a", ("", "a", "/"), ("a/", "b", "/")],
    "files.tables:_HUB_ID": ["a", ("", "a", "/"), ("a/b:", "c", ":"), "a/", "a:"],
    "files.tables:_LINE_END": ["\r", "\n", "\r\n"],
    "files.untrusted:_HALF_CHARACTER": ["\\u", "\\ud", "\\ud7"],
    "generation.chat:_CHAT_NAME": ["instruc", "-_", "cha", "-i", "_it", "a"],
    r"generation.chat:[/\\]": ["/", "a/", "a"],
    "generation.chat:^# (.*)$": ["# ", "# \n", "#", "\n"],
    "scoring.base:[^A-Za-z0-9._-]+": ["/", "/a"],
    r"scoring.labels:[\W_]+": ["_", "_a", " "],
    "scoring.labels:([a-z])([A-Z])": ["aA", "a", "A"],
    "scoring.labels:_NOT": ["non", ("no_", "n", "\n"), "_"],
    "scoring.lexical:_SPACE_BEFORE_MARK": [" ", " a", "\n\t", ("", " ", "a"), " ."],
    "scoring.lexical:_WORD": ["a", "'", ("a", "'", ""), "a'", "a!!", "$"],
    "scoring.refusals:_CONTRACTIONS": [
        ("can", " ", "x"),
        "can ",
        "can\tno",
        "n'",
        "'",
        "'s",
        "fulfi",
    ],
    "scoring.refusals:_END_OF_SENTENCE": ["."],
    "scoring.refusals:_REFUSAL": [
        ". ",
        ("oh", " .", " x"),
        "oh ",
        "oh . ",
        ("thanks", " a", ""),
        ("thanks", " .", " but"),
        ("thanks", " but", " x"),
        ("thanks ", "a", ""),
        ("i", " really", " x"),
        ("i cannot", " really", " x"),
        ("i am not", " really", " x"),
        ("i cannot provide ", "a", " "),
        ("i cannot answer ", "a ", ""),
        ("as an ", "a", " i"),
        ("as an ai created by ", "a", " x"),
        "so ",
    ],
    "scoring.refusals:_REWRITING": [
        ". ",
        "oh . ",
        ("i cannot", " really", " x"),
        ("i cannot write ", "a ", ""),
        ("i cannot write ", "a", ""),
        ("thanks", " but", " x"),
    ],
    "scoring.refusals:_TOKEN": ["a", "a'", "'", ("a", "'", "")],
    "scoring.sources:_LICENCE": [("license:", " ", ""), "license:", "license: \n", "\n"],
    r"training.data.corpus:\n\s*\n": [
        "\n",
        ("\n", " ", "a"),
        "\n a",
        ("\n", "\t ", ""),
        " ",
        "\r",
    ],
    "training.negatives.answers:_AFTERWORD": ["!", ("note", " ", "x"), ("please ", "note ", "")],
    "training.negatives.answers:_ITEM": [
        " ",
        ("- ", " ", "\n"),
        ("1", " ", "x"),
        ("1. ", " ", "\n\n"),
        ("- ", "a", "\n\n"),
    ],
    "training.negatives.answers:_NEXT_TURN": [
        "\n",
        "\n ",
        ("\n", "#", " "),
        "\n##",
        ("\n##", "\n", ""),
        ("\nuser", " ", "x"),
        "\nuser",
        "<",
        "\n\t\r",
    ],
    "training.negatives.answers:_PREAMBLE": [
        ("sure", " a", ""),
        ("here is ", "paraphras", ""),
        ("here is ", "paraphras", "!"),
        "paraphras",
        ("paraphrase:", "*", ""),
        ("paraphrase", " ", ""),
        ("", "a", " paraphrase"),
        ("paraphrase:", " ", ""),
        "*",
    ],
    "training.negatives.endpoint:_ESCAPE": ["\\u00", "\\", "\\u0061"],
    "training.negatives.answers:_THOUGHT": ["<think>", "<think", ("<think>", "a", ""), "</think"],
    "training.negatives.answers:_YES": [
        ("sure", "!", ""),
        ("sure!", " ", "x"),
        ("sure", ".,", " "),
    ],
    r"training.negatives.config:\{sentence\}|\{n\}": ["{", "{n", "{sentence", "{n}"],
    r"training.negatives.filters:\w+": ["a", "a ", " "],
    "scoring.offensive:(?i)[aeiou]": ["a", "b"],
    "scoring.offensive:_FIRST_WORD": ["a", "a ", " "],
    "scoring.offensive:_WORD": ["a", "a ", " "],
    "vocabulary.token_table:_BYTE": ["<0x0", "<", ("<0x", "0", ">")],
    "vocabulary.token_table:_UNUSED": ["[unused", ("[unused", "1", ""), "<"],
    "vocabulary.words:WORD": ["é", "日", "a…", ("", "a", "!"), ("", "日", "€")],
    "training.output:_WRITING": ["os error ", ("os error ", "1", "x"), "PyTorch", "No space "],
}


class TooSlowError(Exception):
    pass


@contextlib.contextmanager
def limit(seconds):
    if not hasattr(signal, "setitimer"):
        pytest.skip("this system cannot interrupt a running pattern")

    def stop(*_):
        raise TooSlowError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def long_text(worst, length=LENGTH):
    start, unit, end = ("", worst, "") if isinstance(worst, str) else worst
    return start + unit * ((length - len(start) - len(end)) // len(unit)) + end


def is_re(node, names):
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "re"
        and node.func.attr in names
    )


def patterns_of(module):
    """``key: (patterns, methods)`` of a module, read from its source."""
    tree, short = parse(module), module.removeprefix("fusion_detox.")
    named = set()
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            inside = [call for call in ast.walk(node.value) if is_re(call, {"compile"})]
            named.update(inside)
            if inside:
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                value = getattr(importlib.import_module(module), target.id)
                if isinstance(value, re.Pattern):
                    used = {
                        one.attr
                        for one in ast.walk(tree)
                        if isinstance(one, ast.Attribute)
                        and isinstance(one.value, ast.Name)
                        and one.value.id == target.id
                    }
                    assert used & METHODS, f"{module}: {target.id} is not used"
                    yield f"{short}:{target.id}", [value], used & METHODS
                else:
                    kinds = {"sub"} if len(value[0]) == 2 else {"fullmatch"}
                    yield f"{short}:{target.id}", [one[0] for one in value], kinds
    for node in ast.walk(tree):
        if is_re(node, METHODS | {"compile"}) and node not in named:
            pattern = node.args[0]
            assert isinstance(pattern, ast.Constant), (
                f"{module}, line {node.lineno}: compile the pattern at the top of the module"
            )
            flags = re.MULTILINE if "MULTILINE" in ast.unparse(node) else 0
            compiled = re.compile(pattern.value, flags)
            yield f"{short}:{pattern.value}", [compiled], {node.func.attr}


@functools.cache
def all_patterns():
    found = {}
    for module in SOURCES:
        for key, patterns, methods in patterns_of(module):
            found[key] = patterns, found.get(key, ([], set()))[1] | methods
    return found


def apply(pattern, method, text):
    if isinstance(pattern.pattern, bytes):
        text = text.encode()
    if method in ("sub", "subn"):
        getattr(pattern, method)("x", text)
    elif method == "finditer":
        list(pattern.finditer(text))
    else:
        getattr(pattern, method)(text)


def test_each_pattern_has_a_worst_case():
    assert sorted(all_patterns()) == sorted(WORST)


def test_the_package_uses_no_other_module_for_patterns():
    for module in SOURCES:
        for node in ast.walk(parse(module)):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not {"re", "regex", "sre_compile"} & set(names) or names == ["re"]
            assert not (isinstance(node, ast.ImportFrom) and node.module == "re"), module


@pytest.mark.parametrize("key", sorted(WORST))
def test_a_pattern_reads_its_worst_cases_in_linear_time(key):
    patterns, methods = all_patterns()[key]
    general = [" ", "\n", "a", "A", "1", ".", "_", "'", "a ", "a\n", "\n ", "(", "-", "<"]
    for worst in [*WORST[key], *general]:
        text = long_text(worst)
        for pattern in patterns:
            for method in methods:
                try:
                    with limit(SECONDS):
                        apply(pattern, method, text)
                except TooSlowError:
                    pytest.fail(f"{method} of {pattern.pattern!r} on {worst!r}")


@pytest.mark.parametrize(
    ("pattern", "worst"),
    [
        (r"\s+([.,!?;:])", " "),
        (r"models--([^/\\]+)[/\\]snapshots", "models--"),
        (r"\n\s*(?:#{2,}\s*\w)", "\n"),
        (r"'?\((?:\?i:)?(?:'?[A-Za-z\[\]]{1,6}\|?)+\)[?|]?", ("(", "a", "")),
    ],
)
def test_the_limit_finds_patterns_that_are_not_linear(pattern, worst):
    """The package used these."""
    with pytest.raises(TooSlowError), limit(SECONDS):
        re.compile(pattern).sub("", long_text(worst))


def test_scorers_and_parsers_read_long_hostile_texts():
    scorer = LexicalScorer.load()
    hostile = [" ", "\n", "> ", "toxic: ", "“", "a'", "**", "\n##", "1. ", "<think>"]
    for unit in hostile:
        text = long_text(unit)
        with limit(5.0):
            scorer.score([text])
            is_refusal(text)
            parse_answer(text, sentence="a", wanted=3)


# The patterns that were rewritten match what they matched before.


def random_texts(alphabet, count, seed=0, longest=12):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choices(alphabet, k=rng.randrange(1, longest)))


def lexical_before(text):
    return re.sub(r"\s+([.,!?;:])", r"\1", text)


def lexical_now(text):
    from fusion_detox.scoring.lexical import _SPACE_BEFORE_MARK

    return _SPACE_BEFORE_MARK.sub(r"\1", text)


def test_the_lexical_scorer_joins_the_same_marks_as_before():
    for text in random_texts(" \n\t.,!a\u2003", 20_000):
        assert lexical_now(text) == lexical_before(text), repr(text)


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not there")
def test_the_lexical_scorer_joins_the_same_marks_in_ordinary_text():
    changed = 0
    for name in ("web_posts", "general", "paradetox", "toxicity_labeled"):
        with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for _, line in zip(range(1500), lines, strict=False):
                for text in json.loads(line).values():
                    if isinstance(text, str):
                        assert lexical_now(text) == lexical_before(text)
                        changed += lexical_now(text) != text
    assert changed > 300


def test_an_answer_ends_at_the_same_turn_as_before():
    before = re.compile(
        r"\n\s*(?:#{2,}\s*\w|(?:human|user|assistant|response|instruction)\s*:)|</s>|<\|",
        re.IGNORECASE,
    )

    def cut(pattern, text):
        found = pattern.search(text)
        return None if found is None else text[: found.start()].strip()

    for text in random_texts(["\n", " ", "\t", "##", "User", ":", "a", "</s>", "\r"], 20_000):
        assert cut(_NEXT_TURN, text) == cut(before, text), repr(text)


def test_contractions_are_found_as_before():
    before = re.compile(r"'?\((?:\?i:)?(?:'?[A-Za-z\[\]]{1,6}\|?)+\)[?|]?")
    parts = ["(", "(?i:", "'", "s", "ll", "[sd]", "|", ")", "?", "abcdefg", " "]
    for text in random_texts(parts, 3_000, longest=6):
        assert _CONTRACTIONS.sub("", text) == before.sub("", text), repr(text)
