"""The embedding tensors of every family, found in the files that ``save_pretrained`` writes."""

import runpy
from pathlib import Path

import pytest
import torch

from fusion_detox.alignment.embeddings import of_files

MODELS = runpy.run_path(str(Path(__file__).parents[1] / "family_models.py"))


@pytest.mark.parametrize("name", list(MODELS["FAMILIES"]))
def test_the_tensor_in_the_files_is_the_models(name, tmp_path):
    """Files may name it otherwise than the module: GPT-NeoX's output layer was not found."""
    family = MODELS["FAMILIES"][name]
    tokenizer = MODELS["tokenizer_in_kind"](family.tokenizer)
    model = family.make(len(tokenizer), tokenizer)
    if model.config.is_encoder_decoder:
        pytest.skip("the aligned rules refuse encoder-decoders")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for kind, module in (
        ("output", model.get_output_embeddings()),
        ("input", model.get_input_embeddings()),
    ):
        found = of_files(tmp_path, kind).weight
        torch.testing.assert_close(found.float(), module.weight.detach().float())
