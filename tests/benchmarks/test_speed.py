"""The parts of ``benchmarks/speed.py`` that decide what its numbers mean."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from benchmarks import speed
from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor


@pytest.fixture
def parts(calibrator: Calibrator, other_tokenizer: Any, make_llama: Any) -> tuple[Any, Any]:
    config = FusionConfig(strength=1.5, plausibility=0.0)
    processor = FusionLogitsProcessor(calibrator, other_tokenizer, config)
    return processor, make_llama(len(other_tokenizer), seed=5)


def test_ratio_of_equal_and_of_double_times() -> None:
    one = [[0.01, 0.02, 0.03], [0.011, 0.021, 0.031]]
    assert speed.ratio(one, one) == [1.0, pytest.approx(1, abs=0.1), pytest.approx(1, abs=0.1)]
    assert speed.ratio([[2 * t for t in turn] for turn in one], one)[0] == 2.0


def test_the_parts_add_up_and_the_library_is_left_as_it_was(parts: tuple[Any, Any]) -> None:
    before = [getattr(owner, name) for owner, name, _ in speed.Split.PARTS]
    processor, model = parts
    texts = torch.randint(5, 40, (2, 60))
    found = speed.own_step(processor, texts, speed.Cell("tiny", "greedy", 2, 16), model)
    assert [getattr(owner, name) for owner, name, _ in speed.Split.PARTS] == before
    medians = [found[f"{part}_ms"] for part in ("text", "forward", "map", "rule")]
    assert min(medians) > 0
    assert sum(medians) == pytest.approx(found["step_ms"], rel=0.5)
    assert found["launches"] > found["waits"] > 0


def test_a_plain_and_a_fused_run_write_the_same_forced_text(parts: tuple[Any, Any]) -> None:
    processor, model = parts
    texts = torch.randint(5, 40, (2, 40))
    seen: list[Any] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids)
        return processor(input_ids, scores)

    cell = speed.Cell("tiny", "greedy", 2, 16)
    steps = speed.write(model, [note], texts, cell, tokens=5, pad=0)
    assert len(steps) == 4
    assert torch.equal(seen[-1], texts[:, :20])


def test_the_plan_has_every_batch_and_context() -> None:
    args = argparse.Namespace(
        targets=["smollm2", "350M"], batches=[1, 8], contexts=[32, 512], modes=["sampling", "beams"]
    )
    plan = speed.plan(args)
    assert len(plan) == len(set(plan)) == 3 + 2 + 3
    assert speed.Cell("smollm2", "beams", 2, 32).rows == 8
