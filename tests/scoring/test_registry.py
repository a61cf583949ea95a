"""Scorers by name, and the package detoxify with a stand-in for it."""

from __future__ import annotations

import logging
import sys
import types
import urllib.error

import pytest

from fusion_detox.errors import ConfigError, MissingExtraError, ModelError, ModelNotFoundError
from fusion_detox.scoring import classifier, detoxify_scorer
from fusion_detox.scoring.detoxify_scorer import DetoxifyPackageScorer
from fusion_detox.scoring.lexical import LexicalScorer
from fusion_detox.scoring.perspective import KEY_VARIABLE
from fusion_detox.scoring.registry import SCORERS, make_scorer


class Detoxify:
    """What the package shows: numbers for one text, lists for several, old class names."""

    class_names = ("toxic", "severe_toxicity", "male")

    def __init__(self, model_type, device):
        assert device == "cpu"
        self.model_type = model_type
        self.tokenizer = types.SimpleNamespace(model_max_length=512)

    def predict(self, texts):
        if any("fail" in text for text in texts):
            raise RuntimeError("index out of range")
        rows = [min(len(text) / 100, 1.0) for text in texts]
        return {name: rows if len(texts) > 1 else rows[0] for name in self.class_names}


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("detoxify")
    module.Detoxify = Detoxify
    monkeypatch.setitem(sys.modules, "detoxify", module)
    return module


def test_the_package_detoxify(package, caplog):
    with caplog.at_level(logging.WARNING):
        scorer = make_scorer("detoxify-package:original", batch_size=2)
    assert "unpickles its checkpoint" in caplog.text
    assert scorer.name == "detoxify-package-original"
    assert scorer.score_types(["a" * 10, "b" * 20, "c" * 30, ""]) == {
        "toxicity": [0.1, 0.2, 0.3, 0.0],
        "severe_toxicity": [0.1, 0.2, 0.3, 0.0],
    }
    assert scorer.score(["x" * 50]) == [0.5]
    found = scorer.score(["x" * 50, "fail", "y" * 40])
    assert found[0] == 0.5
    assert found[1] != found[1]
    assert found[2] == 0.4
    record = scorer.record()
    assert record["truncation"] == "512 tokens"
    assert record["licence"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (urllib.error.URLError("no route"), ModelNotFoundError, "no route.*'lexical'"),
        (RuntimeError("bad magic number"), ModelError, "magic number.*'detoxify:unbiased'"),
        (EOFError("Ran out of input"), ModelError, "Ran out of input"),
    ],
)
def test_a_checkpoint_that_cannot_be_had(package, monkeypatch, error, expected, message):
    def fails(*args, **settings):
        raise error

    monkeypatch.setattr(package, "Detoxify", fails)
    with pytest.raises(expected, match=message):
        DetoxifyPackageScorer("unbiased")


def test_a_checkpoint_without_toxicity(package, monkeypatch):
    monkeypatch.setattr(Detoxify, "class_names", ("male",))
    with pytest.raises(ModelError, match="gives no toxicity but"):
        DetoxifyPackageScorer("unbiased")


def test_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "detoxify", None)
    with pytest.raises(MissingExtraError, match=r"'detoxify'.*fusion-detox\[evaluate\]"):
        make_scorer("detoxify-package:unbiased")


def test_scorers_by_name(monkeypatch, package):
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
    monkeypatch.setenv(KEY_VARIABLE, "k")
    names = [make_scorer(spec).name for spec in ("lexical", "perspective")]
    names += [make_scorer(f"detoxify-package:{name}").name for name in detoxify_scorer.VARIANTS]
    names += [settings["name"] for _, settings in made[:2]]
    assert len(set(names)) == len(names)


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


def test_every_scorer_is_described():
    assert [name.partition(":")[0] for name in SCORERS] == [
        *("lexical", "contextual", "detoxify", "detoxify-package", "classifier", "perspective")
    ]
