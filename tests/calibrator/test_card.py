"""The card: its metadata for the hub, and its sections from the training record."""

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fusion_detox.calibrator.card import render_card
from fusion_detox.config import FusionConfig
from fusion_detox.files.cards import yaml_text

RECORD = {
    "command": "fusion-detox train-calibrator out --general=a.jsonl",
    "name": "english-16k",
    "seed": 7,
    "language": "en",
    "license": "Apache-2.0",
    "base_model": "someone/base",
    "settings": {"base_steps": 2000, "learning_rate": None},
    "data": [
        {"name": "Posts | titles", "license": "PDDL 1.0"},
        {"name": "org/set", "license": "CC BY-SA 4.0", "hub": True},
    ],
    "data_files": {"general": [{"name": "a.jsonl", "bytes": 12, "sha256": "ab" * 32}]},
    "documents": {"general": 10, "clean": 8},
    "bits_per_byte": {
        "general": {"clean": 1.31, "reference": 1.29},
        "clean": {"clean": 1.2, "reference": 1.25},
    },
    "curves": {"base": [{"step": 1, "loss": 9.0}]},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "evaluation": {
        "prompts": 597,
        "rules": [{"rule": "contrast", "toxicity": 0.12}, {"rule": "none", "toxicity": 0.5}],
    },
    "clean_text": "human labels",
}


def card(record, name="english-16k"):
    model = {"parameters": 8_300_000, "model_type": "llama"}
    return render_card(
        name,
        {
            "context_length": 128,
            "vocabulary_size": 16384,
            "fusion": FusionConfig(strength=1.5).to_dict(),
        },
        {"clean": model, "reference": model},
        record,
    )


def test_metadata_as_the_hub_reads_it():
    values = ModelCard(card(RECORD)).data.to_dict()
    assert values["library_name"] == "fusion-detox"
    assert values["pipeline_tag"] == "text-generation"
    assert values["language"] == ["en"]
    assert values["license"] == "apache-2.0"
    assert values["base_model"] == "someone/base"
    assert values["datasets"] == ["org/set"]
    assert "fusion-detox" in values["tags"]


def test_sections():
    text = card(RECORD)
    assert "# english-16k\n" in text
    assert 'Calibrator.from_pretrained("english-16k")' in text
    assert "| strength | 1.5 |" in text
    assert "8.3 million parameters" in text
    assert "train-calibrator out --general=a.jsonl" in text
    assert "| seed | 7 |" in text
    assert "| general | a.jsonl | 12 | " + "ab" * 32 in text
    assert "| Posts \\| titles | PDDL 1.0 |  |" in text
    assert "| general | 1.31 | 1.29 |" in text
    assert "torch 2.13.0" in text
    assert "| clean text | human labels |" in text
    assert "## Evaluation" in text
    assert "| contrast | 0.12 |" in text
    assert "English only" in text
    assert "over-blocking" in text
    assert "$" not in text
    assert "{" not in text
    assert "curves" not in text


def test_empty_record():
    text = card({})
    assert "No training record is available." in text
    assert "## Evaluation" not in text
    values = ModelCard(text).data.to_dict()
    assert "license" not in values
    assert "language" not in values


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"license": "My Own Terms"}, {"license": "other", "license_name": "my-own-terms"}),
        ({"license": "CC BY-SA 4.0"}, {"license": "cc-by-sa-4.0"}),
        ({"language": ["en", "no"]}, {"language": ["en", "no"]}),
        ({"base_model": "/home/me/model"}, {}),
        ({"datasets": ["a/b", "not an id!"]}, {"datasets": ["a/b"]}),
    ],
)
def test_metadata_holds_only_what_the_hub_accepts(record, expected):
    values = ModelCard(card(record)).data.to_dict()
    names = ("license", "license_name", "language", "base_model", "datasets")
    assert {name: values[name] for name in names if name in values} == expected


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_yaml_keeps_any_text(text):
    assert yaml.safe_load(f"a: {yaml_text(text)}") == {"a": text}


@pytest.mark.parametrize("text", ["no", "1e3", "a: b", "\ud800", "\u2028x", "---\n", "\U0001f642"])
def test_yaml_keeps_unusual_text(text):
    line = f"a: {yaml_text(text)}"
    assert "\n" not in line
    assert yaml.safe_load(line)["a"] == text


def test_untrusted_text_cannot_break_the_markup():
    text = card(
        {
            "command": "run\n```\n# Heading",
            "clean_text": "line\n\n## Heading <script>",
            "license": "a\n---\nb: c",
            "settings": {"x": "1\n# Heading\n---\n{{ name }}"},
        },
        name='x"\n# Heading',
    )
    # The only occurrence is inside a code block with a longer fence.
    assert text.count("\n# Heading") == 1
    assert "\n````console\nrun\n```\n# Heading\n````\n" in text
    assert "<script" not in text
    assert "\n## Heading" not in text
    assert text.count("\n---\n") == 1


HOSTILE = (
    "![x](http://tracker.test/a.png)",
    "[x](javascript:alert(1))",
    r"\[x](javascript:alert(1))",
    r"\\![x](data:text/html,a)",
    "[a]: http://tracker.test\n![a]",
    "![a]",
    "<img src=http://tracker.test/a.png>",
    "<javascript:alert(1)>",
    "`a` | ![x](http://tracker.test/a.png) |",
    "``` \n<script>alert(1)</script>\n```",
    "&#91;x&#93;(javascript:alert(1))",
    "\x1b]8;;http://tracker.test\x07\x1b[31m\x9b2J\u202eabc",
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_untrusted_text_adds_no_image_link_html_or_escape(text):
    record = {
        name: [{text: text, "name": text, "license": text}] if name == "data" else text
        for name in (*RECORD, "license", "datasets", "seed", text)
        if name not in ("bits_per_byte", "curves")
    }
    record["settings"] = record["versions"] = {"x": text, text: [text, {"y": text}]}
    record["evaluation"] = {text: text, "rules": [{text: text}]}
    record["bits_per_byte"] = {text: {text: text}}
    written = card({**record, "continued_from": record}, name=text)
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(written)
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    markdown.validateLink = lambda url: True
    tokens = markdown.parse(written.partition("\n---\n")[2])
    kinds = {one.type for token in tokens for one in [token, *(token.children or [])]}
    assert "table_open" in kinds, "the card was parsed"
    assert not kinds & {"image", "link_open", "html_inline", "html_block"}
