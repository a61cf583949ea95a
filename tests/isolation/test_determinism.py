"""The same text, whatever the batch, the order and the earlier calls."""

import pytest
import torch

from fusion_detox import FusionLogitsProcessor
from fusion_detox.generation.sampling import Sampling, generate_rows, jobs

from .world import CONTRAST, TEXTS, fresh


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("vocabulary", ["other_tokenizer", "sentencepiece_tokenizer"])
def test_a_text_does_not_depend_on_its_batch(pristine, request, make_llama, vocabulary, how):
    """Alone, together, in another order, twice, and with more padding."""
    tokenizer = request.getfixturevalue(vocabulary)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    size = len(tokenizer)
    model = make_llama(size, seed=6, eos_token_id=None, max_position_embeddings=128)
    processor = FusionLogitsProcessor(
        pristine(vocabulary).calibrator, tokenizer, CONTRAST, pad_token_id=pad
    )
    texts = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]

    def write(rows, padding=0):
        width = max(map(len, rows)) + padding
        found = model.generate(
            torch.tensor([(pad,) * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=pad,
            logits_processor=[processor],
            **how,
        )
        return [tuple(row[width:]) for row in found.tolist()]

    alone = [write([text])[0] for text in texts]
    assert len(set(alone)) > 2
    assert write(texts) == alone
    assert write(texts[::-1]) == alone[::-1]
    assert write(texts[1:3] + texts[1:3], padding=5) == alone[1:3] * 2
    assert write(texts[3:], padding=11) == alone[3:]


def test_the_same_seed_gives_the_same_text(pristine, request, make_llama):
    """Sampled text is the same twice in a row, after other calls and, per row, in any batch."""
    tokenizer = request.getfixturevalue("other_tokenizer")
    model = make_llama(len(tokenizer), seed=6, eos_token_id=None)
    model.generation_config.eos_token_id = None
    processor = fresh(pristine("other_tokenizer"))
    ids = tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"].repeat(3, 1)

    def sample(seed, processor=processor):
        torch.manual_seed(seed)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=8,
            pad_token_id=0,
            logits_processor=[processor],
        ).tolist()

    first = sample(1)
    assert sample(2) != first
    assert sample(1) == first
    assert sample(1, fresh(processor)) == first
    processor.reset()
    assert sample(1) == first

    def rows(pending, size):
        sampling = Sampling(max_new_tokens=8, samples=2, seed=5)
        return {
            (row.job.index, row.job.sample): row.completion.token_ids
            for row in generate_rows(
                model, tokenizer, pending, sampling, processor=processor, batch_size=size
            )
        }

    pending = jobs(TEXTS[:4], 2)
    together = rows(pending, 8)
    assert len(set(together.values())) > 4
    assert rows(pending, 1) == together
    assert rows(pending[::-1], 3) == together
    half = rows(pending[1::2], 4)
    assert half == {key: together[key] for key in half}
