"""Listed words are held back as the definition says, wherever they begin and end."""

import pytest
import torch

from fusion_detox import FusionLogitsProcessor

from .conftest import CONFIG, VOCABULARIES

TEXTS = [
    "The weather was fine, you idio",
    "You are so stupi",
    "It is a nic",
    "He said ",
    "“Oh, th",
]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_words_equal_the_definition(cases, name):
    case = cases(name)
    rows = [case.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    scores = torch.randn(len(rows), case.width, generator=torch.Generator().manual_seed(3))
    for plausibility in (CONFIG.plausibility, 0.0):
        config = CONFIG.replace(plausibility=plausibility)
        settings = {"pad_token_id": case.pad, "verify": "off"}
        processor = FusionLogitsProcessor(case.calibrator, case.tokenizer, config, **settings)
        definition = case.definition_of(config)
        fused = processor.fuse_rows(rows, scores)
        expected = torch.stack(
            [definition(row, own) for row, own in zip(rows, scores, strict=True)]
        )
        known = slice(0, len(case.tokenizer))
        torch.testing.assert_close(fused[:, known], expected[:, known].float(), atol=2e-4, rtol=0)
        config = config.replace(word_weight=0.0)
        without = FusionLogitsProcessor(case.calibrator, case.tokenizer, config, **settings)
        changed = (without.fuse_rows(rows, scores) - fused).abs().amax(-1)
        assert (changed > 0.1).all(), changed
