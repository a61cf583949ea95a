"""What names a variant's files."""

from __future__ import annotations

import copy
from typing import Any

from fusion_detox import Calibrator
from fusion_detox.evaluation.targets import Target
from fusion_detox.evaluation.variants import parse_variant


def test_other_listed_words_give_other_files(
    calibrator: Calibrator, byte_tokenizer: Any, make_llama: Any
) -> None:
    model, stems = make_llama(len(byte_tokenizer), seed=5), set()
    for words in ({}, {"idiot": 2.0}, {"idiot": 3.0}):
        listed = copy.copy(calibrator)
        listed.words = words
        target = Target(model, byte_tokenizer, "tiny", calibrator=listed)
        prepared = target.prepare(parse_variant("default"))
        stems.add(prepared.stem)
        assert prepared.about["calibrator"].get("words", 0) == len(words)
    assert len(stems) == 3
