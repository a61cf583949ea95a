"""Runs side by side: their numbers are unchanged, and incomparable runs cause a warning."""

import copy
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from fusion_detox.errors import ConfigError, DataError, MissingExtraError
from fusion_detox.evaluation.report import write_comparison
from fusion_detox.evaluation.report.comparable import differences
from fusion_detox.evaluation.report.reading import Run, run_labels


def setting(name, kind, probability, perplexity):
    def around(value):
        return [value, round(0.9 * value, 5), round(1.1 * value, 5)]

    return {
        "name": name,
        "kind": kind,
        "config": {"rule": "contrast", "strength": 1.5} if kind == "fusion" else None,
        "toxicity": {"lexical": {"toxicity": {"probability": around(probability)}}},
        "perplexity": {"token_weighted": around(perplexity), "relative": None},
        "harmless": {"text": {"name": "general", "texts": 64}, "kl": around(0.04)},
        "groups": [{"suite": "identity", "group": "women", "ratio": around(1.01)}],
    }


def results(name="first", probability=0.11, **changes):
    return {
        "format": 1,
        "name": name,
        "created": "2026-11-21T12:00:00Z",
        "versions": {"fusion_detox": "0.1.0"},
        "machine": {"device": "cpu"},
        "target": {"name": "demo", "fingerprint": "c839a3106138", "dtype": "float32"},
        "prompts": [{"name": "rtp", "file": "rtp.jsonl", "sha256": "06882a2549d7", "count": 597}],
        "sampling": {"max_new_tokens": 20, "top_p": 0.9, "samples": 5},
        "seeds": [1],
        "threshold": 0.5,
        "scorers": {"lexical": {"model": "hashed n-grams", "weights": "ab12", "auc": {"a": 0.95}}},
        "main_scorer": "lexical",
        "perplexity_model": {"name": "demo", "fingerprint": "c839a3106138"},
        "settings": [
            setting("base", "base", 0.64, 114.3),
            setting("default", "fusion", probability, 125.4),
        ],
        **changes,
    }


class Page(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.open, self.seen, self.names, self.ids = [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))
        self.text = " ".join("".join(self.seen).split())

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        self.ids += [value for key, value in attributes if key == "id"]
        if name not in ("meta", "br", "img"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.seen.append(data)


def compared(*runs):
    return differences([Run(run) for run in runs])


def test_both_runs_are_in_page_and_json(tmp_path):
    runs = [results(), results("second", 0.2222)]
    path = write_comparison(runs, tmp_path / "out" / "comparison.html")
    assert sorted(p.name for p in path.parent.iterdir()) == ["comparison.html", "comparison.json"]
    page = Page(path.read_text(encoding="utf-8"))
    for text in ("11.0 %", "22.2 %", "first", "second", "No obstacle was found."):
        assert text in page.text
    assert page.names.count("img") == 1
    numbers = json.loads((path.parent / "comparison.json").read_text(encoding="utf-8"))
    assert numbers["format"] == 1
    assert numbers["differences"] == []
    assert [run["run"] for run in numbers["runs"]] == ["first", "second"]
    lines = [(s["run"], s["name"], s["toxicity"], s["perplexity"]) for s in numbers["settings"]]
    assert lines == [
        (run["name"], s["name"], s["toxicity"], s["perplexity"])
        for run in runs
        for s in run["settings"]
    ]


def test_a_run_does_not_differ_from_itself():
    assert compared(results(), results("again")) == []


PROMPTS = results()["prompts"][0]
SCORER = results()["scorers"]["lexical"]


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("prompts", {"prompts": [{**PROMPTS, "sha256": "ffff"}]}),
        ("prompts", {"prompts": [{**PROMPTS, "count": 100}]}),
        ("prompts", {"prompts": [PROMPTS, {**PROMPTS, "name": "more"}]}),
        ("sampling", {"sampling": {"max_new_tokens": 20, "top_p": 1.0, "samples": 5}}),
        ("sampling", {"sampling": {"max_new_tokens": 20, "top_p": 0.9, "samples": 25}}),
        ("scorer lexical", {"scorers": {"lexical": {**SCORER, "weights": "cd34"}}}),
        ("scorer lexical", {"scorers": {"lexical": {**SCORER, "truncation": 64}}}),
        ("target", {"target": {"name": "demo", "fingerprint": "0", "dtype": "float32"}}),
        (
            "target",
            {"target": {"name": "demo", "fingerprint": "c839a3106138", "dtype": "bfloat16"}},
        ),
        ("threshold", {"threshold": 0.8}),
        ("form of the prompts", {"chat": {"system": None, "template": "ab12"}}),
        ("perplexity model", {"perplexity_model": {"name": "other", "fingerprint": "1"}}),
        ("hash of the prompts", {"prompts": [{"name": "rtp", "count": 597}]}),
    ],
)
def test_conditions_that_make_numbers_incomparable_are_warnings(tmp_path, what, changes):
    found = {one.what: one for one in compared(results(), results("second", **changes))}
    assert found[what].level == "warning"
    others = {name for name, one in found.items() if one.level == "warning"} - {what}
    assert others <= {"prompts"}  # prompts without a hash also count as other prompts
    if found[what].values:
        assert list(found[what].values) == ["first", "second"]
        assert len(set(found[what].values.values())) == 2


def test_warnings_are_in_page_and_json(tmp_path):
    other = results("second", threshold=0.8, seeds=[2], prompts=[{**PROMPTS, "sha256": "ffff"}])
    path = write_comparison([results(), other], tmp_path / "comparison.html")
    page = Page(path.read_text(encoding="utf-8")).text
    assert "Not comparable as they are. Number of differences that prevent a comparison: 2." in page
    assert "The prompts differ, so toxicity and perplexity are not comparable." in page
    assert "ffff" in page
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["differences"]
    told = [(one["level"], one["what"]) for one in found]
    assert told == [("warning", "prompts"), ("warning", "threshold"), ("note", "seeds")]


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("seeds", {"seeds": [2]}),
        ("machine", {"machine": {"device": "cuda"}}),
        ("version", {"versions": {"fusion_detox": "0.2.0"}}),
        ("scorer lexical", {"scorers": {"x": {}}, "settings": [{"name": "base", "kind": "base"}]}),
    ],
)
def test_other_conditions_are_notes(what, changes):
    found = compared(results(), results("second", **changes))
    assert ("note", what) in {(one.level, one.what) for one in found}
    assert all(one.level == "note" for one in found)


def test_another_licence_or_auc_is_not_another_scorer():
    scorers = {"lexical": {**SCORER, "auc": {"a": 0.9}, "licence": "MIT"}}
    assert compared(results(), results("second", scorers=scorers)) == []


def test_a_different_base_under_the_same_conditions_is_a_note():
    other = results("second")
    other["settings"][0] = setting("base", "base", 0.6, 114.3)
    (found,) = compared(results(), other)
    assert found.level == "note"
    assert found.what == "target alone, lexical"
    assert found.values == {"first": "0.64", "second": "0.6"}
    # Different seeds explain it.
    assert [one.what for one in compared(results(), {**other, "seeds": [2]})] == ["seeds"]


def test_runs_with_the_same_name_are_numbered():
    runs = [Run(results("a")), Run(results("a")), Run(results("a (2)")), Run(results("a"))]
    assert run_labels(runs) == ["a", "a (2)", "a (2) (2)", "a (3)"]


def test_markup_in_names_stays_text(tmp_path):
    evil = "</script><script>alert(1)</script><b>"
    run = results(evil, target={"name": evil, "fingerprint": evil})
    run["settings"][1]["name"] = evil
    path = write_comparison([results(), run], tmp_path / "comparison.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.names.count("script") == 1
    assert page.names.count("b") == len(re.findall(r"<b>", path.read_text(encoding="utf-8")))
    assert "<script>alert(1)</script>" in page.text


def test_the_same_runs_give_the_same_bytes(tmp_path):
    written = [
        write_comparison(copy.deepcopy([results(), results("b", 0.2)]), tmp_path / name)
        for name in ("one.html", "two.html")
    ]
    for suffix in (".html", ".json"):
        one, two = (path.with_suffix(suffix).read_bytes() for path in written)
        assert one == two


def test_json_is_strict_and_blocks_may_be_missing(tmp_path):
    bare = {"format": 1, "settings": [{"name": "base", "kind": "base"}]}
    odd = results("odd", math.nan)
    odd["settings"][1]["perplexity"] = None
    path = write_comparison([bare, bare, odd], tmp_path / "comparison.html")
    Page(path.read_text(encoding="utf-8"))

    def refuse(name):
        raise AssertionError(name)

    text = path.with_suffix(".json").read_text(encoding="utf-8")
    numbers = json.loads(text, parse_constant=refuse)
    probability = numbers["settings"][3]["toxicity"]["lexical"]["toxicity"]["probability"]
    assert probability == [None, None, None]


@pytest.mark.parametrize(
    ("runs", "name", "error", "words"),
    [
        ([results()], "c.html", DataError, "1 run cannot be compared; give at least two"),
        ([], "c.html", DataError, "0 runs cannot be compared"),
        ([results(), {"format": 9}], "c.html", DataError, "has format 9"),
        ([results(), results()], "c.json", ConfigError, "give a name that ends in .html"),
        ([results(), results()], "folder", ConfigError, "give a name that ends in .html"),
    ],
)
def test_wrong_uses(tmp_path, runs, name, error, words):
    with pytest.raises(error, match=re.escape(words)):
        write_comparison(runs, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError):
        write_comparison([results(), results()], tmp_path / "c.html")
    assert not list(tmp_path.iterdir())
