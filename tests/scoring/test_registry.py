"""Scorers by name."""

from __future__ import annotations

import pytest

from fusion_detox.errors import ConfigError
from fusion_detox.scoring import classifier
from fusion_detox.scoring.lexical import LexicalScorer
from fusion_detox.scoring.registry import SCORERS, make_scorer


def test_scorers_by_name(monkeypatch):
    made = []

    def load(source, **settings):
        made.append((source, settings))
        return source

    monkeypatch.setattr(classifier.ClassifierScorer, "load", load)
    assert isinstance(make_scorer(" lexical "), LexicalScorer)
    assert make_scorer("detoxify") == "unitary/unbiased-toxic-roberta"
    assert make_scorer("detoxify:original") == "unitary/toxic-bert"
    assert make_scorer("classifier:C:\\models\\x", label="bad", batch_size=7) == "C:\\models\\x"
    assert [settings["batch_size"] for _, settings in made] == [32, 32, 7]
    assert made[0][1]["name"] == "detoxify-unbiased"
    assert made[2][1]["label"] == "bad"
    assert make_scorer("classifier:org/name#very bad") == "org/name"
    assert made.pop()[1]["label"] == "very bad"
    names = [make_scorer("lexical").name]
    names += [settings["name"] for _, settings in made[:2]]
    assert len(set(names)) == len(names)
    assert make_scorer("detoxify:org/own-detoxify") == "org/own-detoxify"
    assert made.pop()[1]["multi_label"]


@pytest.mark.parametrize(
    "spec", ["", "toxicity", "lexical:", "lexical:x", "classifier", "classifier:", "detoxify:"]
)
def test_unknown_scorers(spec):
    with pytest.raises(ConfigError, match=r"there is no scorer .* choose one of: lexical, context"):
        make_scorer(spec)


def test_wrong_options():
    with pytest.raises(ConfigError, match=r"'lexical' takes no label \('bad'\); only classifier:"):
        make_scorer("lexical", label="bad")
    with pytest.raises(ConfigError, match="no Detoxify 'big'"):
        make_scorer("detoxify:big")


def test_removed_scorers_name_their_replacements():
    with pytest.raises(ConfigError, match=r"shuts down after 2026\. Use 'contextual'"):
        make_scorer("perspective")
    with pytest.raises(ConfigError, match=r"can run code\. Use 'detoxify:original'.*FOLDER"):
        make_scorer("detoxify-package:unbiased")


def test_a_pickled_checkpoint_is_refused(tmp_path):
    checkpoint = tmp_path / "toxic_debiased.ckpt"
    checkpoint.write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"is a file\. Pickled Detoxify .* save_pretrained"):
        make_scorer(f"detoxify:{checkpoint}")


def test_every_scorer_is_described():
    assert [name.partition(":")[0] for name in SCORERS] == [
        *("lexical", "contextual", "detoxify", "classifier")
    ]
