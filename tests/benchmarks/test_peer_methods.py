"""The peers' rules, compared with their equations written out for one row at a time."""

import gzip
import json
import math

import pytest
import torch
from torch import nn

from benchmarks import peer_methods as rules
from benchmarks.peer_training import LENGTH, Graded, RewardModel, batch_of, graded_texts
from benchmarks.peers import read_prompts

PAD = 0


@pytest.fixture
def models(make_llama):
    return [make_llama(40, seed=seed) for seed in range(3)]


@pytest.fixture
def steps():
    """Two rows of unequal length, and one token more in each of the following steps."""
    noise = torch.Generator().manual_seed(3)
    rows = torch.randint(5, 40, (2, 9), generator=noise)
    rows[0, :3] = PAD
    return [rows[:, :end] for end in (6, 7, 8, 9)]


def plain(model, ids):
    """Log-probs of a single unpadded text, ``(length, V)``."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def texts(ids):
    return [[token for token in row if token != PAD] for row in ids.tolist()]


def test_a_companion_reads_each_row_as_if_it_were_alone(models, steps):
    prefixes = [[7, 8, 9], [5]]
    companion = rules.Companion(models[0], PAD, prefixes)
    for ids in [*steps, steps[1].flip(0), steps[2].flip(0)]:
        found = companion(ids).log_softmax(-1).reshape(4, -1)
        whole = [prefix + row for prefix in prefixes for row in texts(ids)]
        for row, text in enumerate(whole):
            alone = plain(models[0], text)
            assert torch.allclose(found[row], alone[-1], atol=1e-4)
            known = sum(float(alone[k, text[k + 1]]) for k in range(len(text) - 1))
            assert float(companion.text_log_prob[row]) == pytest.approx(known, abs=1e-3)
            assert int(companion.counted[row]) == len(text) - 1


def test_dexperts_adds_the_experts_difference_to_the_truncated_target(models, steps):
    target, clean, toxic = models
    rule = rules.DExperts(clean, toxic, PAD, 2.0, 0.9)
    for ids in steps:
        own = torch.stack([plain(target, text)[-1] for text in texts(ids)])
        found = rule(ids, own).softmax(-1)
        for row, text in enumerate(texts(ids)):
            order = own[row].exp().sort(descending=True)
            kept = order.indices[: int((order.values.cumsum(0) < 0.9).sum()) + 1]
            mixed = torch.full((40,), -torch.inf)
            change = plain(clean, text)[-1] - plain(toxic, text)[-1]
            mixed[kept] = (own[row] + 2.0 * change)[kept]
            assert torch.allclose(found[row], mixed.softmax(-1), atol=1e-4)


def test_gedi_weights_by_the_posterior_of_the_whole_text(models, steps):
    target, clean, toxic = models
    rule = rules.GeDi(clean, toxic, PAD, 5.0, scale=2.0, bias=0.3, keep=0.0)
    for ids in steps:
        own = torch.stack([plain(target, text)[-1] for text in texts(ids)])
        found = rule(ids, own).log_softmax(-1)
        for row, text in enumerate(texts(ids)):
            for token in (5, 17, 39):
                whole, means = [*text, token], []
                for model in (clean, toxic):
                    alone = plain(model, whole)
                    known = [float(alone[k, whole[k + 1]]) for k in range(len(text))]
                    means.append(sum(known) / len(known))
                chance = 1 / (1 + math.exp(-2.0 * (means[0] - means[1]) - 0.3))
                other = float(found[row, token] - own[row, token]) - 5.0 * math.log(chance)
                if token == 5:
                    normaliser = other
                assert other == pytest.approx(normaliser, abs=1e-3)


def test_gedi_removes_only_tokens_that_are_probably_toxic(models, steps):
    own = torch.randn(2, 40)
    rule = rules.GeDi(models[1], models[2], PAD, 5.0, scale=3.0, bias=0.0)
    unfiltered = rules.GeDi(models[1], models[2], PAD, 5.0, scale=3.0, bias=0.0, keep=0.0)
    removed = torch.isinf(rule(steps[0], own))
    weighted = unfiltered(steps[0], own).softmax(-1)
    assert removed.any()
    assert ((weighted * removed).sum(-1) < 0.8).all()
    assert not removed.all(dim=-1).any()


class Words:
    """A tokenizer of lower-case letters for the reward model, and of ids for the target."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) - 97 for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(
            "" if token == 39 else chr(97 + token % 26) * (1 + token // 26) for token in ids
        )


def test_rad_rewards_each_candidate_as_text(models, steps):
    torch.manual_seed(0)
    reward = RewardModel(models[0]).eval()
    words, own = Words(), torch.randn(2, 40)
    own[0, 39] = 9.0  # a special token: an empty text
    rule = rules.Rad(reward, words, 30, words, PAD, 4.0, candidates=5)
    for ids in steps:
        found = rule(ids, own)
        assert torch.isfinite(found).sum(1).tolist() == [5, 5]
        for row, text in enumerate(texts(ids)):
            for token in own[row].topk(5).indices.tolist():
                whole = [30, *words(words.decode(text) + words.decode([token]))["input_ids"]]
                with torch.no_grad():
                    toxicity = float(reward(input_ids=torch.tensor([whole]))[0][0, -1])
                expected = float(own[row, token]) + 4.0 * (1 - toxicity)
                assert float(found[row, token]) == pytest.approx(expected, abs=1e-3)


def test_rectification_caps_risky_tokens_and_leaves_safe_ones(models, steps):
    head = nn.Linear(models[0].config.hidden_size, 40)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    own = torch.randn(2, 40).log_softmax(-1)
    safe = rules.Rectification(models[0], head, PAD, 0.0)(steps[0], own)
    assert torch.allclose(safe, own, atol=1e-5)
    top = int(own[0].argmax())
    with torch.no_grad():
        head.bias[top] = -0.99
    capped = rules.Rectification(models[0], head, PAD, 0.0)(steps[0], own).exp()
    assert float(capped[0, top]) < 0.011
    rest = [token for token in range(40) if token != top]
    ratio = capped[0, rest] / own[0, rest].exp()
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), atol=1e-4)


def test_self_debias_lowers_what_its_prefixes_make_likelier(models, steps, monkeypatch):
    monkeypatch.setattr(rules, "SELF_DEBIAS_PREFIXES", ("abc", "z"))
    target, words = models[0], Words()
    rule = rules.SelfDebias(target, words, PAD, 10.0)
    for ids in steps:
        own = torch.stack([plain(target, text)[-1] for text in texts(ids)])
        found = rule(ids, own)
        for row, text in enumerate(texts(ids)):
            biased = torch.stack([plain(target, [*p, *text])[-1].exp() for p in ([0, 1, 2], [25])])
            excess = (biased.amax(0) - own[row].exp()).clamp(min=0)
            factor = torch.exp(-10.0 * excess).clamp(min=0.01)
            assert torch.allclose(found[row], own[row] + factor.log(), atol=1e-4)
        assert not torch.allclose(found, own, atol=1e-2)


def test_a_batch_marks_the_graded_text_only():
    rows = [Graded("ab", "cde", 1.0), Graded("", "f", 0.0), Graded("g" * 100, "hi", 0.5)]

    def tokenize(text, add_special_tokens=False, **_):
        return Words()(text)

    batch = batch_of(tokenize, rows, [30], "cpu")
    assert batch.ids[0, :6].tolist() == [30, 0, 1, 2, 3, 4]
    assert batch.graded[0, :7].tolist() == [0, 0, 0, 1, 1, 1, 0]
    assert batch.mask.sum(1).tolist() == [6, 2, LENGTH]
    assert batch.ids[2, -2:].tolist() == [7, 8]
    assert batch.graded.sum(1).tolist() == [3, 1, 2]


def test_no_prompt_that_is_measured_was_trained_on(tmp_path):
    def write(name, rows):
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    texts = [f"prompt number {number}" for number in range(40)]
    write(
        "paradetox.jsonl.gz", [{"toxic": "a", "neutral": ["b"]}, {"toxic": "c", "neutral": ["c"]}]
    )
    write("toxicity_labeled.jsonl.gz", [{"text": "d", "label": "neither"}])
    graded = {"text": " and on", "toxicity": 0.7}
    rows = [{"prompt": {"text": text, "toxicity": 0.2}, "continuation": graded} for text in texts]
    write("rtp_challenging.jsonl", rows)
    learned = graded_texts(tmp_path)
    assert learned[:3] == [Graded("", "a", 1.0), Graded("", "b", 0.0), Graded("", "d", 0.0)]
    seen = {one.prompt or one.text for one in learned[3:]}
    measured = read_prompts(tmp_path, None)
    assert seen
    assert seen.isdisjoint(measured)
    assert sorted([*seen, *measured]) == sorted(texts)
    assert read_prompts(tmp_path, 5) == measured[:5]
