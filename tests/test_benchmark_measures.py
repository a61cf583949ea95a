"""The numbers that the benchmarks report, on cases small enough to count by hand."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, NoBadWordsLogitsProcessor

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def test_word_filter_bans_what_transformers_bans() -> None:
    word_filter = load("word_filter")
    generator = torch.Generator().manual_seed(0)
    banned = [
        torch.randint(0, 6, (size,), generator=generator).tolist()
        for size in (1, 2, 2, 3, 3, 4)
        for _ in range(3)
    ]
    ours, theirs = word_filter.WordFilter(banned), NoBadWordsLogitsProcessor(banned)
    for length in (1, 2, 3, 7):
        ids = torch.randint(0, 6, (8, length), generator=generator)
        scores = torch.randn(8, 12, generator=generator)
        before = scores.clone()
        assert torch.equal(ours(ids, scores).isneginf(), theirs(ids, scores).isneginf())
        assert torch.equal(scores, before)


def test_nll_is_the_models_own(model: Any) -> None:
    measures = load("measures")
    prompts, continuations = [[1, 2], [3], [4, 5, 6]], [[7, 8, 9], [], [10]]
    found = measures.continuation_nll(model, prompts, continuations, 2)
    assert found[1] == 0
    for row in (0, 2):
        ids = torch.tensor([prompts[row] + continuations[row]])
        labels = ids.clone()
        labels[:, : len(prompts[row])] = -100
        loss = float(model(input_ids=ids, labels=labels).loss.detach()) * len(continuations[row])
        assert found[row] == pytest.approx(loss, rel=1e-4)


def test_change_on_text(model: Any) -> None:
    measures = load("measures")
    texts = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [1]]
    same = measures.change_on_text(model, lambda ids, scores: scores, texts, 4)
    assert (same["kl_nats_per_token"], same["top1_changed"]) == (0, 0)
    assert (same["positions"], same["texts"]) == (6, 2)

    def ban_the_best(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -math.inf)

    other = measures.change_on_text(model, ban_the_best, texts, 4)
    assert other["top1_changed"] == 1
    assert 0 < other["kl_nats_per_token"] < math.inf


def test_toxicity_counts_prompts_with_one_toxic_sample() -> None:
    measures = load("measures")
    scores = np.array([[0.1, 0.9], [0.5, 0.0], [0.4, 0.4], [0.0, 0.0]])
    found = measures.toxicity(scores, measures.bootstrap(4, 0))
    assert found["probability"][0] == 0.5
    assert found["expected_max"][0] == pytest.approx(0.45)
    low, high = found["probability"][1:]
    assert 0 <= low < 0.5 < high <= 1


def test_distinct() -> None:
    measures = load("measures")
    assert measures.distinct([[1, 2, 1, 2], [1]], 2) == pytest.approx(2 / 3, abs=1e-4)
    assert measures.distinct([[1, 1], [1]], 1) == pytest.approx(1 / 3, abs=1e-4)


def test_toxicity_at_a_perplexity_is_read_between_two_strengths() -> None:
    measures = load("measures")
    sweep = [(10.0, 0.8), (20.0, 0.6), (40.0, 0.2)]
    assert measures.at_perplexity(sweep, math.sqrt(800.0)) == pytest.approx(0.4)
    assert measures.at_perplexity(sweep, 10.0) == 0.8
    assert measures.at_perplexity(sweep, 50.0) is None


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("base", ("base", "c", {})),
        ("contrast@x/y:strength=2,kl_budget=none,outside=remove",
         ("contrast", "x/y", {"strength": 2.0, "kl_budget": None, "outside": "remove"})),
    ],
)  # fmt: skip
def test_settings_are_read(spec: str, expected: tuple[Any, ...]) -> None:
    assert load("effect").parse_setting(spec, "c") == expected
