"""Metrics count what was fused and change nothing of it."""

from __future__ import annotations

import sys
import threading
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import FusionConfig, FusionLogitsProcessor
from fusion_detox.errors import ConfigError, MissingExtraError
from fusion_detox.integrations.metrics import FusionMetrics, MeasuredProcessor


@pytest.fixture
def processor(calibrator, target_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "maps"))
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    return FusionLogitsProcessor(calibrator, tokenizer, FusionConfig(strength=3, plausibility=0))


@pytest.fixture
def scores(processor):
    return torch.randn(
        3, len(processor.vocabulary.mapped), generator=torch.Generator().manual_seed(0)
    )


ROWS = [[5, 6], [7], [8, 9, 10]]


def test_scores_are_the_same_and_tokens_are_counted(processor, scores):
    metrics = FusionMetrics()
    measured = MeasuredProcessor(processor, metrics)
    expected = processor.fuse_rows(ROWS, scores, [0, 2, 3])
    assert torch.equal(measured.fuse_rows(ROWS, scores, [0, 2, 3]), expected)
    found = metrics.snapshot()
    assert found[:3] == (1, 3, 2)
    assert found.mean_strength == 2.5
    changed = expected.argmax(-1) != scores.argmax(-1)
    assert found.held_back_tokens == int(changed.sum()) > 0
    assert found.buckets[-1] == (float("inf"), 1)
    assert found.seconds_sum > 0


def test_strength_0_holds_nothing_back(processor, scores):
    metrics = FusionMetrics()
    assert MeasuredProcessor(processor, metrics).fuse_rows(ROWS, scores, 0) is scores
    assert metrics.snapshot()[:5] == (1, 3, 0, 0, 0.0)
    assert metrics.snapshot().mean_strength == 0


def test_generate_and_derived_processors_are_counted(processor, target_folder):
    """Also what ``with_settings`` and ``following`` return, with a strength for each prompt."""
    model = AutoModelForCausalLM.from_pretrained(target_folder).eval()
    metrics = FusionMetrics()
    measured = (
        MeasuredProcessor(processor, metrics).following("You are ").with_settings(strength=[1, 0])
    )
    plain = processor.following("You are ").with_settings(strength=[1, 0])
    inputs = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "min_new_tokens": 4, "max_new_tokens": 4}
    options = {"do_sample": False, "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    texts = [
        model.generate(**inputs, **options, logits_processor=[each]) for each in (measured, plain)
    ]
    assert torch.equal(*texts)
    assert metrics.snapshot()[:3] == (4, 8, 4)
    assert metrics.snapshot().mean_strength == 1


def test_threads_lose_no_step():
    """Eight threads; an unguarded counter loses some of 8000 steps."""
    metrics = FusionMetrics((0.5,))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: [metrics.observe([1, 0], 1, 0.5) for _ in range(1000)])
            for _ in range(8)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(before)
    found = metrics.snapshot()
    assert found[:5] == (8000, 16000, 8000, 8000, 8000.0)
    assert found.buckets == ((0.5, 8000), (float("inf"), 8000))


def test_bounds_must_ascend():
    for bounds in ((), (1, 0.5), (1, 1)):
        with pytest.raises(ConfigError, match="ascending"):
            FusionMetrics(bounds)


def test_prometheus_reads_the_metrics():
    pytest.importorskip(
        "prometheus_client",
        reason='prometheus-client is not installed: pip install -e ".[metrics]"',
    )
    from prometheus_client import CollectorRegistry, generate_latest

    from fusion_detox.integrations.prometheus import FusionCollector

    metrics = FusionMetrics((0.01, 0.1))
    metrics.observe([2, 0], 1, 0.05)
    registry = CollectorRegistry()
    registry.register(FusionCollector(metrics))
    lines = generate_latest(registry).decode().splitlines()
    assert {
        "fusion_detox_tokens_total 2.0",
        "fusion_detox_fused_tokens_total 1.0",
        "fusion_detox_held_back_tokens_total 1.0",
        "fusion_detox_strength_sum_total 2.0",
        'fusion_detox_step_seconds_bucket{le="0.01"} 0.0',
        'fusion_detox_step_seconds_bucket{le="0.1"} 1.0',
        'fusion_detox_step_seconds_bucket{le="+Inf"} 1.0',
        "fusion_detox_step_seconds_sum 0.05",
    } <= set(lines)


def test_a_port_in_use_is_named():
    pytest.importorskip(
        "prometheus_client",
        reason='prometheus-client is not installed: pip install -e ".[metrics]"',
    )
    import socket

    from fusion_detox.integrations.prometheus import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            serve(FusionMetrics(), port)
    serve(FusionMetrics(), port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b"fusion_detox_tokens_total 0.0" in answer.read()


def test_without_prometheus_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "fusion_detox.integrations.prometheus", raising=False)
    with pytest.raises(MissingExtraError, match="prometheus_client"):
        __import__("fusion_detox.integrations.prometheus")
