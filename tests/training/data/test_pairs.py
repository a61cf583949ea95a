"""Paraphrase sets: the library's own rows, two published formats, and errors."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.training.data.pairs import ParaphraseSet, read_pairs

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of public data is not here")
GOOD = {
    "anchor": "He left.",
    "positives": ["He went away.", "He left."],
    "negatives": ["The idiot left."],
    "prompt": "News:",
    "provenance": {"model": "m", "scores": [0.5]},
}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="pairs.jsonl"):
        path = tmp_path / name
        lines = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
        path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
        return path

    return write


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_own_rows_are_read_as_written(write, name):
    first = ParaphraseSet("He left.", ("He went.",), ("Idiot went.",), "News:", {"seed": 3})
    second = ParaphraseSet("Ünïcode \u2028 text", ("a", "b"), ("c",))
    found = read_pairs([write(first.to_row(), second.to_row(), name=name)])
    assert found == [first, second]
    assert [dict(one.provenance) for one in found] == [{"seed": 3}, {}]


def test_one_source_or_several_in_order(write):
    one = write(GOOD, name="a.jsonl")
    two = write({**GOOD, "anchor": "Other."}, name="b.jsonl")
    assert [pair.anchor for pair in read_pairs([two, one])] == ["Other.", "He left."]
    assert read_pairs(one) == read_pairs([str(one)])


def test_duplicates_within_a_side_are_removed(write):
    row = {**GOOD, "positives": ["Bye.", " Bye. ", "Bye  now."], "negatives": ["x", "x", "y"]}
    (pair,) = read_pairs([write(row)])
    assert pair.positives == ("Bye.", "Bye  now.")
    assert pair.negatives == ("x", "y")


def test_the_key_depends_on_the_content(write):
    (pair,) = read_pairs([write(GOOD)])
    (same,) = read_pairs([write({**GOOD, "provenance": {}})])
    assert pair.key == same.key
    for change in ({"anchor": "No."}, {"positives": ["He left."]}, {"prompt": ""}):
        assert read_pairs([write({**GOOD, **change})])[0].key != pair.key
    moved = {**GOOD, "positives": ["He went away."], "negatives": ["He left.", "The idiot left."]}
    assert read_pairs([write(moved)])[0].key != pair.key, (
        "a wording that changed sides makes another set"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positives": []}, r"line 2: the anchor 'He left.' has no positives; give at least one"),
        ({"negatives": []}, r"line 2: the anchor 'He left.' has no negatives; give at least one"),
        ({"anchor": "  "}, r"line 2: anchor holds an empty text; remove it"),
        ({"positives": ["ok", ""]}, r"line 2: positives holds an empty text; remove it"),
        ({"negatives": ["\n"]}, r"line 2: negatives holds an empty text"),
        ({"negatives": [None]}, r"line 2: negatives must hold text, but holds None"),
        ({"positives": [3]}, r"line 2: positives must hold text, but holds 3"),
        ({"prompt": 5}, r"line 2: prompt must hold text, but holds 5"),
        ({"provenance": [1]}, r"line 2: provenance must be an object, but is \[1\]"),
        (
            {"negatives": ["He  went\naway. "]},
            r"line 2: 'He went away.' is both a positive and a negative .* remove it from one",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_line(write, change, message):
    path = write(GOOD, {**GOOD, **change})
    with pytest.raises(DataError, match=message) as caught:
        read_pairs([path])
    assert str(path) in str(caught.value)


def test_rows_of_unknown_format(write):
    row = dict(GOOD)
    del row["negatives"]
    with pytest.raises(DataError, match=r"line 1 lacks 'negatives': it has the fields anchor"):
        read_pairs([write(row)])
    with pytest.raises(DataError, match=r"line 1: it has the fields text, but .* toxic, neutral;"):
        read_pairs([write({"text": "hello"})])


def test_files_without_usable_rows(write, tmp_path):
    with pytest.raises(DataError, match=r"line 2 is not JSON: .*'\{\"anchor\": \"torn'"):
        read_pairs([write(GOOD, '{"anchor": "torn')])
    with pytest.raises(DataError, match=r"item 1 must be an object with named fields, not 1"):
        read_pairs([write("[1, 2]")])
    with pytest.raises(DataError, match="is empty"):
        read_pairs([write("")])
    with pytest.raises(DataFileError, match="neither a file, a folder nor a hub id"):
        read_pairs([tmp_path / "missing.jsonl"])
    with pytest.raises(DataError, match="no source of paraphrase sets"):
        read_pairs([])


def test_paradetox_rows(write, caplog):
    rows = [
        {"toxic": "damn cold", "neutral": ["cold", "very cold", "cold"]},
        {"toxic": "same", "neutral": ["same "]},
        {"toxic": "some  shit", "neutral": ["some shit", "something"]},
        {"toxic": "x", "neutral": "y"},
        {"toxic": "x", "neutral": []},
    ]
    with caplog.at_level(logging.WARNING):
        first, second, third = read_pairs([write(*rows)])
    assert first == ParaphraseSet("cold", ("cold", "very cold"), ("damn cold",))
    assert second == ParaphraseSet("something", ("something",), ("some  shit",))
    assert third == ParaphraseSet("y", ("y",), ("x",))
    assert "2 unusable rows were skipped" in caplog.text
    assert "line 2 (both sides are equal)" in caplog.text
    assert "line 5 (one side is empty)" in caplog.text


def test_a_table_of_paradetox(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text("toxic\tneutral\ndamn cold\tcold\n", encoding="utf-8")
    assert read_pairs([path]) == [ParaphraseSet("cold", ("cold",), ("damn cold",))]


def test_dialogues(write):
    turn = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Who are you?\n\nAssistant:"
    (pair,) = read_pairs([write({"chosen": turn + " A program.", "rejected": turn + " A pest."})])
    assert pair == ParaphraseSet(" A program.", (" A program.",), (" A pest.",), turn)
    assert (pair.prompt + pair.negatives[0]) == turn + " A pest."


def test_a_dialogue_that_continues_after_the_answer(write):
    """The answers begin where the dialogues differ, and may contain further turns."""
    start = "\n\nHuman: Hi\n\nAssistant:"
    row = {"chosen": start + " A\n\nHuman: B\n\nAssistant: C", "rejected": start + " D"}
    (pair,) = read_pairs([write(row)])
    assert pair.prompt == start
    assert pair.positives == (" A\n\nHuman: B\n\nAssistant: C",)


def test_only_unusable_rows_are_an_error(write):
    row = {"chosen": "no turns", "rejected": "at all"}
    with pytest.raises(DataError, match=r"all 1 rows are unusable, .*line 1 \(the two dialogues"):
        read_pairs([write(row)])


def published(name):
    with gzip.open(SHARED / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@shared
def test_the_published_paradetox_can_be_read(caplog):
    with caplog.at_level(logging.WARNING):
        pairs = read_pairs([SHARED / "paradetox.jsonl.gz"])
    # An independent count of 10,707 rows; in some, the neutral side only repeats the toxic text.
    rows = published("paradetox.jsonl.gz")
    usable = [
        row
        for row in rows
        if {" ".join(text.split()) for text in row["neutral"]} - {" ".join(row["toxic"].split())}
    ]
    assert [pair.negatives[0] for pair in pairs] == [row["toxic"] for row in usable]
    assert 10_500 < len(pairs) < len(rows) == 10_707
    assert f"{len(rows) - len(pairs)} unusable rows" in caplog.text


@shared
def test_the_published_dialogues_can_be_read():
    pairs = read_pairs([SHARED / "hh_harmless.jsonl.gz"])
    rows = published("hh_harmless.jsonl.gz")
    whole = {(row["chosen"], row["rejected"]) for row in rows}
    assert 2_300 < len(pairs) < len(rows) == 2_312
    for pair in pairs:
        assert (pair.prompt + pair.anchor, pair.prompt + pair.negatives[0]) in whole
        assert pair.prompt.endswith("\n\nAssistant:")
        assert pair.anchor.strip()
        assert pair.anchor != pair.negatives[0]
