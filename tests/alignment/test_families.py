"""Each family's embedding tensors are found in the files that ``save_pretrained`` writes."""

import runpy
from pathlib import Path

import pytest
import torch

from fusion_detox.alignment.embeddings import checkpoint_embeddings

MODELS = runpy.run_path(str(Path(__file__).parents[1] / "family_models.py"))


@pytest.mark.parametrize("name", list(MODELS["FAMILIES"]))
def test_embeddings_in_files_equal_those_of_the_model(name, tmp_path):
    """Files may use other names than the module, such as GPT-NeoX's output layer."""
    family = MODELS["FAMILIES"][name]
    tokenizer = MODELS["tokenizer_in_kind"](family.tokenizer)
    model = family.make(len(tokenizer), tokenizer)
    if model.config.is_encoder_decoder:
        pytest.skip("the aligned rules do not support encoder-decoder models")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for kind, module in (
        ("output", model.get_output_embeddings()),
        ("input", model.get_input_embeddings()),
    ):
        found = checkpoint_embeddings(tmp_path, kind).weight
        torch.testing.assert_close(found.float(), module.weight.detach().float())
