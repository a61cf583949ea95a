"""``processor.overlap(model)``: the same results, read on another thread while the target runs."""

import threading

import pytest
import torch
from transformers import LogitsProcessor

from fusion_detox import FusionConfig, FusionLogitsProcessor
from fusion_detox.errors import ConfigError

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}
CONFIG = FusionConfig(strength=2.0, plausibility=1e-4, context_kl=0.05)


class Recorder(LogitsProcessor):
    """Keeps what a processor returns."""

    def __init__(self, processor):
        self.processor, self.results = processor, []

    def __call__(self, input_ids, scores):
        self.results.append(self.processor(input_ids, scores))
        return self.results[-1]


@pytest.fixture
def target(make_llama, other_tokenizer):
    return make_llama(len(other_tokenizer), seed=7)


@pytest.fixture
def processor(calibrator, other_tokenizer):
    return FusionLogitsProcessor(calibrator, other_tokenizer, CONFIG)


def generate(target, tokenizer, processor, mode):
    tokenizer.padding_side = "left"
    rows = 1 if "lookup" in mode else 2
    inputs = tokenizer(["You are a complete", "It"][:rows], return_tensors="pt", padding=rows > 1)
    torch.manual_seed(0)
    recorder = Recorder(processor)
    ids = target.generate(
        **inputs, **MODES[mode], max_new_tokens=12, pad_token_id=0, logits_processor=[recorder]
    )
    return ids, recorder.results


@pytest.mark.parametrize("mode", MODES)
def test_results_are_the_same(target, other_tokenizer, processor, mode):
    wanted, scores = generate(target, other_tokenizer, processor, mode)
    processor.reset()
    hooks = len(target._forward_pre_hooks)
    with processor.overlap(target) as overlapped:
        found, others = generate(target, other_tokenizer, overlapped, mode)
        again, _ = generate(target, other_tokenizer, overlapped, mode)
    assert torch.equal(found, wanted)
    assert torch.equal(again, wanted)
    for one, other in zip(scores, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(target._forward_pre_hooks) == hooks


def test_the_calibrator_runs_on_another_thread(target, other_tokenizer, processor, monkeypatch):
    processor(torch.tensor([[5, 6]]), torch.zeros(1, len(other_tokenizer)))
    (session,) = processor._sessions.values()
    processor.reset()
    threads, logits = [], session._decoder.logits
    monkeypatch.setattr(
        session._decoder,
        "logits",
        lambda rows: threads.append(threading.get_ident()) or logits(rows),
    )
    with processor.overlap(target) as overlapped:
        generate(target, other_tokenizer, overlapped, "greedy")
    assert len(threads) >= 12
    assert threading.get_ident() not in threads
    generate(target, other_tokenizer, processor, "sampling")
    assert threading.get_ident() in threads


def test_wrong_guesses_and_failures_change_nothing(target, other_tokenizer, processor, monkeypatch):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    scores = torch.randn(2, len(other_tokenizer), generator=torch.Generator().manual_seed(1))
    wanted = processor(ids, scores)
    processor.reset()
    with processor.overlap(target) as overlapped:
        target(ids.flip(0))
        torch.testing.assert_close(overlapped(ids, scores), wanted)
        target(inputs_embeds=torch.zeros(2, 3, target.config.hidden_size))
        torch.testing.assert_close(overlapped(ids, scores), wanted)
        monkeypatch.setattr(overlapped, "_read_ahead", None)
        target(ids + 1)
        torch.testing.assert_close(overlapped(ids, scores), wanted)
    with pytest.raises(ZeroDivisionError), processor.overlap(target):
        raise ZeroDivisionError
    assert not target._forward_pre_hooks
    assert not [one for one in threading.enumerate() if one.name.startswith("fusion-detox")]


def test_what_overlap_cannot_do_is_refused(target, calibrator, other_tokenizer):
    elsewhere = FusionLogitsProcessor(
        calibrator, other_tokenizer, CONFIG, device="meta", verify="off"
    )
    refused = pytest.raises(ConfigError, match=r"calibrator on a CPU thread, but it is on meta")
    with refused, elsewhere.overlap(target):
        pass
