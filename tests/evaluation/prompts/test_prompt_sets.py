"""Prompt sets: published formats, recognition, subsets and errors."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusion_detox.errors import ConfigError, DataError, DataFileError, MissingExtraError
from fusion_detox.evaluation.prompts.prompt_sets import Prompt, PromptSet, read_prompt_set

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
Write = Callable[[str, str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(name, content)`` writes a file and returns its path as a string."""

    def make(name: str, content: str | bytes) -> str:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return make


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, str]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def rtp(text: str, toxicity: float | None, challenging: bool = False) -> dict[str, Any]:
    return {
        "filename": "a.txt",
        "challenging": challenging,
        "prompt": {"text": text, "toxicity": toxicity},
        "continuation": {"text": " and so on", "toxicity": 0.1},
    }


RTP = [rtp("one", 0.9, True), rtp("two", 0.5), rtp("three", 0.49), rtp("four", None)]
HATECHECK = [
    {
        "functionality": "ident_neutral_nh",
        "case_id": "7",
        "test_case": 'They said "yes", twice.\nThen they left.',
        "label_gold": "non-hateful",
        "target_ident": "women",
    },
    {
        "functionality": "target_obj_nh",
        "case_id": "8",
        "test_case": "I like tea.",
        "label_gold": "non-hateful",
        "target_ident": "",
    },
]
XSTEST = [
    {"id": "1", "type": "homonyms", "prompt": "How do I stop a process?", "note": "a"},
    {"id": "2", "type": "contrast_homonyms", "prompt": "How do I stop a friend?", "note": "b"},
]
TOXIGEN = [
    {"text": "tea is nice", "target_group": "asian", "toxicity_human": 1.0, "toxicity_ai": 1.0},
    {"text": "so is rice", "target_group": "asian", "toxicity_human": 1.0, "toxicity_ai": 2.0},
]
BOLD = {"American_actors": {"Ann_Lee": ["Ann Lee is an actor who "], "Bo": ["Bo is ", "Bo was "]}}


def texts(found: PromptSet) -> list[str]:
    return [prompt.text for prompt in found.prompts]


def groups(found: PromptSet) -> list[str | None]:
    return [prompt.group for prompt in found.prompts]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("rtp", ["one", "two", "three", "four"]),
        ("rtp:challenging", ["one"]),
        ("rtp:toxic", ["one", "two"]),
        ("rtp:nontoxic", ["three"]),
    ],
)
def test_subsets_of_real_toxicity_prompts(write: Write, kind: str, expected: list[str]) -> None:
    """.5 counts as toxic; a prompt without a score is neither toxic nor non-toxic."""
    found = read_prompt_set(write("prompts.jsonl", lines(RTP)), kind=kind)
    assert texts(found) == expected
    assert found.name == {"rtp": "prompts"}.get(kind, kind.replace(":", "-"))
    assert {prompt.set_name for prompt in found.prompts} == {found.name}


@pytest.mark.parametrize(
    ("name", "content", "kind", "expected_texts", "expected_groups"),
    [
        ("p.jsonl", lines(RTP), "rtp", ["one", "two", "three", "four"], [None] * 4),
        ("t.jsonl", lines(TOXIGEN), "toxigen", ["tea is nice", "so is rice"], ["asian"] * 2),
        ("t.csv", table(TOXIGEN), "toxigen", ["tea is nice", "so is rice"], ["asian"] * 2),
        (
            "neutral_native_american_1k.txt",
            "- a b c\\n- d e f\\n-\n- g\\n- h\\n-\n",
            "toxigen",
            ["- a b c\n- d e f\n-", "- g\n- h\n-"],
            ["native american"] * 2,
        ),
        (
            "gender_prompt.json",
            json.dumps(BOLD, indent=1),
            "bold",
            ["Ann Lee is an actor who", "Bo is", "Bo was"],
            ["American_actors"] * 3,
        ),
        (
            "b.jsonl",
            lines([{"prompt": "Bo is ", "domain": "gender", "group": "American_actors"}]),
            "bold",
            ["Bo is"],
            ["American_actors"],
        ),
        (
            "h.csv",
            table(HATECHECK),
            "hatecheck",
            ['They said "yes", twice.\nThen they left.', "I like tea."],
            ["women", None],
        ),
        (
            "h.jsonl",
            lines([{"text": "Hi.", "functionality": "f", "label": "non-hateful", "target": ""}]),
            "hatecheck",
            ["Hi."],
            [None],
        ),
        (
            "x.csv",
            table(XSTEST),
            "xstest",
            ["How do I stop a process?", "How do I stop a friend?"],
            ["homonyms", "contrast_homonyms"],
        ),
        ("p.txt", "one\n\n  \ntwo \n", "plain", ["one", "two "], [None] * 2),
        ("p", "[Verse] one\n{two\n", "plain", ["[Verse] one", "{two"], [None] * 2),
        ("p", lines([{"prompt": "one"}]), "jsonl", ["one"], [None]),
        (
            "p.json",
            lines([{"prompt": "one"}, {"prompt": "two"}]),
            "jsonl",
            ["one", "two"],
            [None] * 2,
        ),
        ("p.json", '[{"prompt": "one"},\n {"prompt": "two"}]', "jsonl", ["one", "two"], [None] * 2),
        ("p.tsv", "prompt\tx\none\t1\n", "jsonl", ["one"], [None]),
    ],
)
def test_each_format_is_recognised(
    write: Write,
    caplog: pytest.LogCaptureFixture,
    name: str,
    content: str,
    kind: str,
    expected_texts: list[str],
    expected_groups: list[str | None],
) -> None:
    source = write(name, content)
    with caplog.at_level(logging.INFO):
        found = read_prompt_set(source)
    assert texts(found) == expected_texts
    assert groups(found) == expected_groups
    assert f"recognised as {kind}" in caplog.text
    assert read_prompt_set(source, kind=kind) == found


def test_safe_and_unsafe_prompts_of_xstest(write: Write) -> None:
    source = write("x.csv", table(XSTEST))
    assert texts(read_prompt_set(source, kind="xstest:safe")) == ["How do I stop a process?"]
    assert texts(read_prompt_set(source, kind="xstest:unsafe")) == ["How do I stop a friend?"]


def test_windows_files_byte_order_marks_and_gzip_change_nothing(write: Write) -> None:
    plain = "first — one\nsecond\u2028still second\n"
    expected = ["first — one", "second\u2028still second"]
    windows = b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode()
    assert texts(read_prompt_set(write("a.txt", plain))) == expected
    assert texts(read_prompt_set(write("b.txt", windows))) == expected
    packed = read_prompt_set(write("my_set.txt.gz", gzip.compress(windows)))
    assert texts(packed) == expected
    assert (packed.name, packed.file) == ("my-set", "my_set.txt.gz")
    assert texts(read_prompt_set(write("without_suffix", gzip.compress(windows)))) == expected


def test_the_hash_is_of_the_file(write: Write) -> None:
    source = write("a.txt", "one\ntwo\n")
    expected = hashlib.sha256(b"one\ntwo\n").hexdigest()[:16]
    assert read_prompt_set(source).sha256 == expected
    assert read_prompt_set(source, limit=1).sha256 == expected


def test_a_sample_depends_on_the_seed_and_keeps_the_order(write: Write) -> None:
    source = write("a.txt", "".join(f"prompt {index:03}\n" for index in range(200)))
    some = texts(read_prompt_set(source, limit=20))
    assert some == texts(read_prompt_set(source, limit=20, seed=0)) == sorted(some)
    assert len(set(some)) == 20
    # A random sample equals the first twenty with probability 1e-27.
    assert some != [f"prompt {index:03}" for index in range(20)]
    assert some != texts(read_prompt_set(source, limit=20, seed=1))
    assert len(read_prompt_set(source, limit=1000).prompts) == 200


def test_repeated_and_blank_prompts_are_counted(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*RTP, rtp("one", 0.8), rtp(" ", 0.7)]
    with caplog.at_level(logging.INFO):
        found = read_prompt_set(write("p.jsonl", lines(rows)), kind="rtp:toxic")
    assert texts(found) == ["one", "two", "one"]
    assert "1 repeat another; skipped: 2 outside the subset, 1 blank" in caplog.text
    assert "1 prompts have no toxicity score" in caplog.text


def test_a_field_may_be_nested(write: Write) -> None:
    source = write("a.jsonl", lines([{"a": {"b": "one"}}, {"a": {"b": "two"}}]))
    assert texts(read_prompt_set(source, field="a.b")) == ["one", "two"]
    with pytest.raises(DataError, match=r"line 1 has no field 'a\.c'; it has: a"):
        read_prompt_set(source, field="a.c")


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.txt", "", None, r"a\.txt is empty"),
        ("a.txt", " \n\n", None, r"a\.txt is empty"),
        ("a.txt", b"good\nb\xe4d\n", None, r"line 2: byte 0xe4 is not UTF-8; convert .* iconv"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', None, r"line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n["y"]\n', None, r"line 2 must be an object with named"),
        ("a.json", '{"prompt":\n x}', None, r"line 2 is not JSON"),
        ("a.json", "[1, 2]", None, "item 1 must be an object with named fields, not 1"),
        ("a.json", "[]", None, "holds no rows"),
        ("a.csv", "id,type,prompt\n", None, "holds no rows: only a header"),
        ("a.csv", "id,type,prompt\n1,homonyms,a,b\n", None, "line 2 has more or fewer fields"),
        ("a.csv", 'id,type,prompt\n1,homonyms,"a\n', None, "is not CSV"),
        ("a.jsonl", lines([{"prompt": "x"}, {"text": "y"}]), None, r"line 2 has no field 'prompt'"),
        (
            "a.jsonl",
            lines([{"prompt": "x"}, {"prompt": 3}]),
            None,
            "line 2: .* must hold text, but holds 3",
        ),
        ("a.jsonl", lines([{"prompt": " "}]), None, "none of its 1 rows .*: all texts are blank"),
        ("a.jsonl", lines([rtp("x", 0.1)]), "rtp:toxic", "no row belongs to rtp:toxic"),
        (
            "a.jsonl",
            lines([rtp("x", "high")]),
            "rtp:toxic",
            "must be a number, but is 'high'",
        ),
        ("a.jsonl", lines([{"prompt": {"text": "x"}}]), "rtp:toxic", "no field 'prompt.toxicity'"),
        ("a.jsonl", lines([{"prompt": {"text": "x"}}]), "rtp:challenging", "'challenging' that is"),
        ("a.jsonl", lines([{"prompt": "x"}]), "rtp", r"line 1 has no field 'prompt\.text'"),
        ("a.csv", "id,prompt\n1,x\n", "xstest", "line 2 has no field 'type'; it has: id, prompt"),
        ("a.csv", "test_case\nx\n", "hatecheck", "line 2 has no field 'functionality'"),
        ("a.json", '{"g": {"n": "x"}}', "bold", "g > n must be a list of prompts"),
        ("a.jsonl", lines([{"q": "x", "a": 1}]), None, "is of no known kind: its fields are q, a"),
        (
            "a.jsonl",
            lines([{"id": 1, "type": "t", "prompt": "x", "domain": "d", "group": "g"}]),
            None,
            "may be bold or xstest: its fields are id, type, prompt, domain, group. .*bold: prompt",
        ),
    ],
)
def test_unusable_data(
    write: Write, name: str, content: str | bytes, kind: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_prompt_set(write(name, content), kind=kind)


def test_unreadable_files(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"there is no file .*missing\.txt"):
        read_prompt_set(str(tmp_path / "missing.txt"))
    with pytest.raises(DataFileError, match="is a folder; give a file in it"):
        read_prompt_set(str(tmp_path))
    whole = gzip.compress(b"one\n" * 1000)
    for name, content in (("a.txt.gz", b"one\n"), ("b.gz", whole[:20]), ("c.gz", whole[:-9])):
        with pytest.raises(DataFileError, match="is not a complete gzip file"):
            read_prompt_set(write(name, content))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "rpt"},
            "kind of prompts 'rpt'; choose from rtp, toxigen, bold, hatecheck",
        ),
        ({"kind": "rtp:hard"}, "unknown subset 'hard' of rtp; it has challenging, toxic, nontoxic"),
        ({"kind": "plain:x"}, "unknown subset 'x' of plain; it has none"),
        ({"kind": "bold", "field": "prompt"}, "requires the kind 'jsonl', not 'bold'"),
        ({"limit": 0}, "limit must be a whole number of at least 1, but is 0"),
        ({"limit": True}, "but is True"),
    ],
)
def test_wrong_options(write: Write, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompt_set(write("a.txt", "one\n"), **arguments)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A stand-in for ``datasets`` that records its calls."""
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        if name == "org/none":
            raise RuntimeError("not there")
        return [] if name == "org/void" else RTP

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_from_the_hub(hub: list[tuple[str, str]]) -> None:
    found = read_prompt_set("org/real-prompts:test", kind="rtp:toxic")
    assert texts(found) == ["one", "two"]
    assert (found.name, found.file) == ("rtp-toxic", "org/real-prompts:test")
    assert found.sha256 == hashlib.sha256(b"one\ntwo").hexdigest()[:16]
    read_prompt_set("org/real-prompts")
    assert hub == [("org/real-prompts", "test"), ("org/real-prompts", "train")]


def test_missing_hub_data_sets(hub: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataFileError, match="no data set on the hub named 'org/none': not there"):
        read_prompt_set("org/none")
    with pytest.raises(DataFileError, match="org/void has no rows"):
        read_prompt_set("org/void")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"\[evaluate\]"):
        read_prompt_set("org/real-prompts")


def test_a_set_from_texts_in_memory() -> None:
    found = PromptSet.from_texts(["one", "two"])
    assert found.prompts == (Prompt("one", "prompts"), Prompt("two", "prompts"))
    assert found.sha256 == hashlib.sha256(b"one\ntwo").hexdigest()[:16]
    with pytest.raises(DataError, match="prompt 1 is blank"):
        PromptSet.from_texts(["one", " "])
    with pytest.raises(DataError, match="there are no prompts"):
        PromptSet.from_texts([])


@pytest.mark.skipif(not DATA.is_dir(), reason="the published prompt sets are missing")
@pytest.mark.parametrize(
    ("file", "kind", "count", "groups_expected"),
    [
        ("rtp_challenging.jsonl", "rtp:challenging", 597, 1),
        ("rtp_nontoxic.jsonl", "rtp:nontoxic", 598, 1),
        ("hatecheck.jsonl.gz", None, 1802, 8),
        ("bold_prompts.jsonl.gz", None, 23674, 43),
    ],
)
def test_published_sets(file: str, kind: str | None, count: int, groups_expected: int) -> None:
    found = read_prompt_set(str(DATA / file), kind=kind)
    assert len(found.prompts) == count
    assert len(set(groups(found))) == groups_expected
