"""Incomplete, odd or oversized results documents give a report, or a clear error."""

import math
import re
import sys

import pytest

from fusion_detox.errors import DataError, DataFileError, MissingExtraError
from fusion_detox.evaluation.report import write_report

from .documents import results, setting
from .page import read

BLOCKS = [
    *("command", "versions", "machine", "target", "prompts", "sampling", "seeds", "threshold"),
    *("scorers", "main_scorer", "perplexity_model", "examples", "notes", "name", "created"),
]
PARTS = [
    *("config", "calibrator", "map", "toxicity", "against_base", "perplexity", "diversity"),
    *("similarity", "harmless", "groups", "refusal", "by_prompts", "by_seed", "cost"),
]


@pytest.mark.parametrize("hole", [None, math.nan, [], "text"])
def test_any_block_may_be_missing_or_odd(tmp_path, undrawn, hole):
    def few():
        every = results()
        return {**every, "settings": [every["settings"][i] for i in (0, 1, 5)]}

    for key in BLOCKS:
        document = few()
        document[key] = hole
        read(write_report(document, tmp_path))
    for key in PARTS:
        document = few()
        for item in document["settings"]:
            item[key] = hole
        page = read(write_report(document, tmp_path))
        assert "nan" not in re.findall(r"\w+", page.text), key
    read(write_report({"format": 1, "settings": [{"name": "base", "kind": "base"}]}, tmp_path))


def without_numbers(value, gone):
    """A document whose numbers are all nan, or whose intervals have no ends."""
    if isinstance(value, dict):
        return {key: without_numbers(item, gone) for key, item in value.items()}
    if isinstance(value, list):
        if gone == "ends" and len(value) == 3 and isinstance(value[0], float):
            return [value[0], None, None]
        return [without_numbers(item, gone) for item in value]
    return math.nan if gone == "all" and isinstance(value, float) else value


@pytest.mark.parametrize("gone", ["all", "ends"])
def test_numbers_may_be_nan_and_intervals_may_lack_ends(tmp_path, gone):
    page = read(write_report(without_numbers(results(), gone), tmp_path))
    assert "nan" not in re.findall(r"\w+", page.text.lower())


def test_thirty_settings_with_long_names(tmp_path):
    fused = [
        setting(f"{'very-' * 40}long-$name$-{i} 🙂", "fusion", 0.9**i / 2, 114 * 1.25**i, i / 5)
        for i in range(28)
    ]
    for i, item in enumerate(fused):
        item["config"]["rule"] = ("contrast", "mixture", "product")[i % 3]
    ends = [setting("base", "base", 0.64, 114.3), setting("words", "wordfilter", 0.17, 115.5)]
    page = read(write_report(results([*ends, *fused]), tmp_path))
    rows = [found for found in page.all("tr") if found]
    assert rows
    assert page.text.count("long-$name$-27") >= 5
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_no_prompt_is_toxic(tmp_path):
    base, fused = setting("base", "base", 0.0, 100.0), setting("x", "fusion", 0.0, 100.0, 1.0)
    page = read(write_report(results([base, fused]), tmp_path))
    assert "These prompts cannot show an effect." in page.text


def test_duplicate_names_give_unique_ids(tmp_path, undrawn):
    settings = [setting("base", "base", 0.6, 100.0)]
    settings += [setting("same", "fusion", 0.2, 110.0, s) for s in (1.0, 2.0)]
    read(write_report(results(settings), tmp_path))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"format": 2, "settings": []}, "has format 2, but this version reads format 1"),
        ({}, "has format None"),
        ({"format": 1, "settings": []}, "has no settings, so there is nothing to report"),
        ({"format": 1, "settings": None}, "has no settings"),
        ([], "A list is not a results document"),
    ],
)
def test_other_documents_are_refused(tmp_path, document, words):
    with pytest.raises(DataError, match=re.escape(words)):
        write_report(document, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"\[evaluate\]"):
        write_report(results(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created(tmp_path, undrawn):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataFileError, match=r"cannot be written .*a writable folder"):
        write_report(results(), tmp_path / "file" / "report")
