"""Text classifiers as scorers, and how their toxic labels are found."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from fusion_detox.errors import ConfigError, ModelError, ModelNotFoundError, VocabularyError
from fusion_detox.scoring import classifier, detoxify
from fusion_detox.scoring.classifier import ClassifierScorer
from fusion_detox.scoring.labels import find_toxic, is_multi_label, type_name
from fusion_detox.scoring.sources import weights_hash

TEXTS = [
    "The weather was fine, so we walked to the river and had lunch there.",
    "You are a complete idiot and nobody wants to hear your stupid opinion.",
    "Shut up.",
    "x",
    "Thank you so much for your help. " * 20,
]
JIGSAW = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    made = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    made.pad_token = made.eos_token = "<|endoftext|>"
    return made


def make(labels, cls=BertForSequenceClassification, config=BertConfig, **settings):
    values = {"vocab_size": 400, "max_position_embeddings": 64, "pad_token_id": 0, **SIZES}
    names = dict(enumerate(labels))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return cls(config(**{**values, "id2label": names, **settings})).eval()


@pytest.fixture
def save(tmp_path, tokenizer):
    def save(labels, name="model", **settings):
        folder = tmp_path / name
        make(labels, **settings).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@torch.inference_mode()
def logits_alone(folder, tokenizer, texts, length):
    model = BertForSequenceClassification.from_pretrained(folder)
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        rows.append(model(**inputs).logits[0])
    return torch.stack(rows)


def test_softmax_of_two_labels(save, tokenizer):
    folder = save(["non-toxic", "toxic"])
    scorer = ClassifierScorer.load(folder, batch_size=2)
    expected = torch.softmax(logits_alone(folder, tokenizer, TEXTS, 64), -1)
    scores = scorer.score_types(TEXTS)
    assert scores["toxicity"] == pytest.approx(expected[:, 1].tolist(), abs=1e-5)
    assert scores["non_toxic"] == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    assert list(scores) == ["toxicity", "non_toxic"]
    assert scorer.score(TEXTS) == scores["toxicity"]
    assert max(scores["toxicity"]) - min(scores["toxicity"]) > 0.1


def test_the_pipeline_of_transformers_agrees(save, tokenizer):
    folder = save(JIGSAW, problem_type="multi_label_classification")
    scorer = ClassifierScorer.load(folder)
    pipe = pipeline("text-classification", str(folder), top_k=None, device="cpu")
    scores = scorer.score_types(TEXTS[:4])
    assert list(scores) == [
        *("toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack")
    ]
    for row, found in enumerate(pipe(TEXTS[:4])):
        by_label = {item["label"]: item["score"] for item in found}
        for label in JIGSAW:
            assert scores[type_name(label)][row] == pytest.approx(by_label[label], abs=1e-5)


def test_sums_of_exclusive_labels(save, tokenizer):
    folder = save(["hate speech", "normal", "offensive"])
    scorer = ClassifierScorer.load(folder)
    chances = torch.softmax(logits_alone(folder, tokenizer, TEXTS, 64), -1)
    assert scorer.score(TEXTS) == pytest.approx((1 - chances[:, 1]).tolist(), abs=1e-5)
    assert scorer.record()["toxicity"] == "p(hate speech) + p(offensive)"
    assert set(scorer.score_types([])) == {"toxicity", "hate_speech", "normal", "offensive"}


def test_a_single_negated_label_is_inverted(save, tokenizer):
    folder = save(["non-toxic"])
    scorer = ClassifierScorer.load(folder)
    chances = torch.sigmoid(logits_alone(folder, tokenizer, TEXTS, 64))[:, 0]
    scores = scorer.score_types([*TEXTS, ""])
    assert scores["toxicity"] == pytest.approx([*(1 - chances).tolist(), 0.0], abs=1e-5)
    assert scores["non_toxic"] == pytest.approx([*chances.tolist(), 1.0], abs=1e-5)


def test_a_label_chosen_by_the_user(save, tokenizer):
    folder = save(["joy", "anger", "sorrow"])
    with pytest.raises(ConfigError, match=r"joy, anger, sorrow\. Name the label with label="):
        ClassifierScorer.load(folder)
    with pytest.raises(ConfigError, match="has no label 'rage'; it has: joy, anger, sorrow"):
        ClassifierScorer.load(folder, label="rage")
    scorer = ClassifierScorer.load(folder, label="Anger")
    chances = torch.softmax(logits_alone(folder, tokenizer, TEXTS, 64), -1)
    assert scorer.score(TEXTS) == pytest.approx(chances[:, 1].tolist(), abs=1e-5)
    assert scorer.name == f"classifier-model-{weights_hash(folder)}-anger"


@pytest.mark.parametrize(
    ("labels", "multi", "rule"),
    [
        (["LABEL_0", "LABEL_1"], False, "p(LABEL_1)"),
        (["neutral", "toxic"], False, "p(toxic)"),
        (["nothate", "hate"], False, "p(hate)"),
        (["NOT_HATE", "HATE"], False, "p(HATE)"),
        (["non-offensive", "offensive"], False, "p(offensive)"),
        (["hate", "offensive", "neither"], False, "p(hate) + p(offensive)"),
        (["not_hate", "racism", "sexism"], False, "1 - p(not_hate)"),
        (["toxicity", "severe_toxicity", "female", "male"], True, "p(toxicity)"),
        (["abusive", "neutral"], True, "p(abusive)"),
        (["neutral"], True, "1 - p(neutral)"),
        (["toxic"], True, "p(toxic)"),
    ],
)
def test_labels_found_by_name(labels, multi, rule):
    assert find_toxic(labels, multi_label=multi, wanted=None, source="x").rule == rule


@pytest.mark.parametrize(
    ("labels", "multi"),
    [
        (["negative", "neutral", "positive"], False),  # sentiment, not toxicity
        (["neutral", "joy"], False),
        (["LABEL_0"], True),  # may be a reward model, with higher scores for harmless text
        (["LABEL_0", "LABEL_1", "LABEL_2"], False),
        (["LABEL_0", "LABEL_1"], True),
        (["hate", "offensive"], True),
    ],
)
def test_unclear_labels_are_not_guessed(labels, multi):
    with pytest.raises(ConfigError, match="It is unclear which labels of x mean toxic"):
        find_toxic(labels, multi_label=multi, wanted=None, source="x")


def test_chosen_labels():
    several = find_toxic(["a, b", "b", "c"], multi_label=True, wanted="c,b", source="x")
    assert (several.indices, several.rule) == ((2, 1), "max(p(c), p(b))")
    assert find_toxic(["a, b", "b"], multi_label=True, wanted="a, b", source="x").indices == (0,)
    with pytest.raises(ConfigError, match="no label ''"):
        find_toxic(["a"], multi_label=True, wanted=" ", source="x")


def test_sigmoid_or_softmax():
    assert is_multi_label(["a", "b"], "multi_label_classification", "x")
    assert not is_multi_label(JIGSAW, "single_label_classification", "x")
    assert is_multi_label(["toxic"], None, "x")
    assert not is_multi_label(["non-toxic", "toxic"], None, "x")
    # Types of toxicity without a harmless label cannot be exclusive.
    assert is_multi_label(JIGSAW, None, "x")
    assert not is_multi_label(["neutral", "toxic", "obscene"], None, "x")
    with pytest.raises(ModelError, match="trained for regression"):
        is_multi_label(["LABEL_0"], "regression", "x")


def test_record_identifies_the_model(save):
    folder = save(["non-toxic", "toxic"])
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")
    record = json.loads(json.dumps(ClassifierScorer.load(folder).record()))
    weights = weights_hash(folder)
    assert record == {
        "name": f"classifier-model-{weights}",
        "model": "model",
        "weights": weights,
        "licence": "mit",
        "labels": ["non-toxic", "toxic"],
        "probabilities": "softmax of all",
        "toxicity": "p(toxic)",
        "truncation": "64 tokens",
    }
    other = save(["non-toxic", "toxic"], name="other/model", hidden_size=32)
    assert ClassifierScorer.load(other).name != record["name"]


def test_texts_are_truncated_to_the_models_limit(save, tokenizer):
    roberta = make(
        ["non-toxic", "toxic"],
        RobertaForSequenceClassification,
        RobertaConfig,
        pad_token_id=1,
        max_position_embeddings=34,
    )
    scorer = ClassifierScorer(roberta, tokenizer, name="roberta")
    assert scorer.max_length == 32
    assert not math.isnan(scorer.score([TEXTS[4]])[0])
    short = ClassifierScorer(roberta, tokenizer, name="roberta", max_length=8)
    start = tokenizer.decode(tokenizer(TEXTS[1])["input_ids"][:8])
    assert short.score([TEXTS[1]]) == pytest.approx(short.score([start]), abs=1e-6)
    assert short.score([TEXTS[1]]) != pytest.approx(scorer.score([TEXTS[1]]), abs=1e-4)


def test_models_without_padding_are_scored_one_by_one(byte_tokenizer):
    config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "num_labels": 2}
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=400, **config)).eval()
    scorer = ClassifierScorer(model, bare, name="gpt2")
    assert all(0 < score < 1 for score in scorer.score(TEXTS[:3]))


def test_a_failed_batch_does_not_affect_the_others(save, caplog):
    scorer = ClassifierScorer.load(save(["non-toxic", "toxic"]))
    forward = scorer.model.forward

    def fails(input_ids, **rest):
        if input_ids.shape[1] > 40:
            raise torch.OutOfMemoryError("out of memory")
        return forward(input_ids=input_ids, **rest)

    expected = scorer.score(TEXTS)
    scorer.model.forward = fails
    with caplog.at_level(logging.WARNING):
        scores = scorer.score(TEXTS)
    assert scores[2:4] == pytest.approx(expected[2:4], abs=1e-5)
    assert math.isnan(scores[4])
    assert "could not score 'Thank you so much for your help. Thank y…': out of memory" in (
        caplog.text
    )


def test_a_model_without_a_trained_head_is_refused(tmp_path, tokenizer):
    values = {"vocab_size": 400, "max_position_embeddings": 64, **SIZES}
    BertModel(BertConfig(**values)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks the tensors classifier.*not a text classifier"):
        ClassifierScorer.load(tmp_path)


def test_models_that_cannot_be_loaded(save, tmp_path, tokenizer):
    with pytest.raises(ModelNotFoundError, match="there is no such folder"):
        ClassifierScorer.load(tmp_path / "missing")
    with pytest.raises(ModelNotFoundError, match="nor in the cache"):
        ClassifierScorer.load("nobody/nothing")
    with pytest.raises(ConfigError, match="device 'nowhere'"):
        ClassifierScorer.load("nobody/nothing", device="nowhere")
    folder = save(["non-toxic", "toxic"])
    with pytest.raises(ModelNotFoundError, match="is a file; give the folder"):
        ClassifierScorer.load(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="AutoModelForSequenceClassification"):
        ClassifierScorer.load(folder)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    model = make(["non-toxic", "toxic"], vocab_size=300)
    with pytest.raises(VocabularyError, match="400 tokens, but the model only 300"):
        ClassifierScorer(model, tokenizer, name="x")


def test_a_length_of_zero_tokens_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"max_length must be a .* at least 1, but is 0"):
        ClassifierScorer(make(["neutral", "toxic"]), tokenizer, name="x", max_length=0)


def test_a_label_named_toxicity_next_to_another_main_label(tokenizer):
    scorer = ClassifierScorer(
        make(["toxicity", "insult"], problem_type="multi_label_classification"),
        tokenizer,
        name="x",
        label="insult",
    )
    assert set(scorer.score_types([])) == {"toxicity", "toxicity_label_0"}


@pytest.fixture
def hub(save, monkeypatch, tokenizer):
    """Maps hub ids to local folders, as if they had been downloaded."""
    monkeypatch.setattr(classifier, "locate", lambda source, what: str(folders[source]))
    folders = {}

    def add(repository, labels):
        folders[repository] = save(labels, name=repository)

    return add


def test_detoxify_from_safetensors(hub, tokenizer, monkeypatch):
    labels = ["toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat"]
    labels += ["sexual_explicit", "male", "female", "christian"]
    hub("unitary/unbiased-toxic-roberta", labels)
    scorer = detoxify.load_detoxify()
    assert scorer.name == "detoxify-unbiased"
    assert list(scorer.score_types(TEXTS)) == list(detoxify.TYPES)
    record = scorer.record()
    assert record["probabilities"] == "sigmoid of each"
    assert record["licence"] == "Apache-2.0"
    assert "later one" in record["note"]
    hub("unitary/toxic-bert", JIGSAW)
    found = detoxify.load_detoxify("original").score_types(TEXTS)
    assert set(found) == set(detoxify.TYPES) - {"sexual_explicit"}
    hub("unitary/multilingual-toxic-xlm-roberta", ["toxic"])
    assert list(detoxify.load_detoxify("multilingual").score_types([])) == ["toxicity"]


def test_detoxify_from_a_folder_loads_only_safetensors(save):
    folder = save(JIGSAW)
    scorer = detoxify.load_detoxify(folder)
    assert set(scorer.score_types(TEXTS)) == set(detoxify.TYPES) - {"sexual_explicit"}
    assert scorer.record()["probabilities"] == "sigmoid of each"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        detoxify.load_detoxify(folder)


def test_detoxify_without_a_network_lists_the_choices():
    with pytest.raises(
        ModelNotFoundError,
        match=r"'unbiased' cannot be loaded: .*'lexical' or 'contextual'.*`hf download unitary/unb",
    ):
        detoxify.load_detoxify()
    with pytest.raises(ConfigError, match="no Detoxify 'small'; choose original, unbiased, mul"):
        detoxify.load_detoxify("small")
