"""The gallery's page and pictures are those of its stored texts, and offensive words are masked."""

import json
import re

from benchmarks import gallery
from fusion_detox.scoring.lexical import LexicalScorer
from fusion_detox.scoring.offensive import offensive_spans

RECORD = json.loads(gallery.RECORD.read_text("utf-8"))


def test_the_page_is_that_of_the_stored_texts():
    assert gallery.PAGE.read_text("utf-8") == gallery.page(RECORD)
    assert [(t["kind"], t["prompt"], t["chat"]) for t in RECORD["texts"]] == list(gallery.PROMPTS)


def test_every_picture_of_the_page_exists_and_no_other():
    named = set(re.findall(r"\(gallery/([\w-]+\.svg)\)", gallery.PAGE.read_text("utf-8")))
    assert named == {path.name for path in gallery.PICTURES.iterdir()}


def test_no_offensive_word_is_shown():
    score = LexicalScorer.load().score
    shown = [gallery.PAGE.read_text("utf-8").replace("\\", "")]
    for path in gallery.PICTURES.glob("*.svg"):
        shown += re.findall(r">([^<]+)</text>", path.read_text("utf-8"))
    words = "\n".join(shown)
    # "Toxic" and the like are what the page is about.
    found = {words[slice(*span)].lower() for span in offensive_spans(words, score)}
    assert found <= {"toxic", "abuse", "hell"}, found
