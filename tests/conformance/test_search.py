"""The processor in ``generate`` equals the definition of each search, token for token."""

import pytest
import torch

from .modes import modes_of


def names(mode):
    return mode.name


def close(found, wanted):
    """Scores agree to 1e-4, and the same tokens are forbidden."""
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", modes_of("test_equals_the_definition"), ids=names)
def test_equals_the_definition(case, mode):
    options = {"max_new_tokens": 5, **mode.options(case)}
    inputs = case.inputs
    if options.pop("begin", False):  # the token is forced when the text has a single token
        inputs = {"input_ids": inputs["input_ids"][:, -1:]}
    prompts = inputs["input_ids"].tolist()
    # older versions of transformers cut at top-k 50 by default
    top_k = {"top_k": 0} if options.get("do_sample") and "top_k" not in options else {}
    asked = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    found = case.generate(**inputs, **{**asked, **top_k, **options})
    search = case.search(prompts, **options)
    torch.manual_seed(11)
    if search.beams > 1:
        rows, totals, steps = search.beam()
        torch.testing.assert_close(found.sequences_scores, torch.tensor(totals), atol=1e-4, rtol=0)
        steps = [dict(enumerate(step)) for step in steps]
    else:
        rows, steps = search.sample()
    assert found.sequences.tolist() == rows
    assert len(found.scores) == len(steps)
    for step, scores, logits in zip(steps, found.scores, found.logits, strict=True):
        for row, (raw, processed) in step.items():
            close(scores[row], processed)
            close(logits[row], raw)
