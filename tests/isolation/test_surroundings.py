"""State of the caller and of the process stays unchanged, and does not affect results."""

import copy
import hashlib
import json
import logging
import os
import pickle
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from fusion_detox import Calibrator, FusionLogitsProcessor
from fusion_detox.errors import VocabularyError
from fusion_detox.files.models import quiet_transformers

from .world import CONTRAST, EXACT, TEXTS, World, fresh, interrupt, scores_for


def digest(model):
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        sha.update(f"{name} {tensor.dtype} {tensor.requires_grad} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        sha.update(f"{name} {module.training} {list(map(len, hooks))}".encode())
    sha.update(model.config.to_json_string().encode())
    sha.update(model.generation_config.to_json_string().encode())
    return sha.hexdigest()


def surroundings():
    """Return the state of the caller and of the whole process, by name."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "torch's random state": hashlib.sha256(torch.get_rng_state().numpy()).hexdigest(),
        "numpy's random state": hashlib.sha256(np.random.get_state()[1]).hexdigest(),  # noqa: NPY002
        "python's random state": hash(random.getstate()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "verbosity": transformers_logging.get_verbosity(),
        "progress bars": transformers_logging.is_progress_bar_enabled(),
        "log levels": {
            name: logging.getLogger(name).level for name in ("", "torch", "fusion_detox")
        },
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "threads running": threading.active_count(),
    }


# this draws random numbers
NO_DROPOUT = {
    "make_llama": {},
    "make_gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("family", ["make_llama", "make_gpt2"])
def test_target_calibrator_and_process_are_unchanged(request, pristine, tmp_path, family, training):
    """No build, call, failure, copy, save or load of a processor changes a bit of them."""
    tokenizer = copy.deepcopy(request.getfixturevalue("other_tokenizer"))
    model = request.getfixturevalue(family)(len(tokenizer), seed=6, **NO_DROPOUT[family]).train(
        training
    )
    calibrator = copy.deepcopy(pristine("other_tokenizer").calibrator)
    calibrator.save_pretrained(tmp_path / "saved")
    model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "pad_token_id": 0}
    # Ignore what transformers itself sets up on first use.
    model.generate(ids, do_sample=False, **common)

    def state():
        return {
            "target": digest(model),
            "clean": digest(calibrator.clean),
            "reference": digest(calibrator.reference),
            "target's tokenizer": tokenizer.backend_tokenizer.to_str(),
            "calibrator's tokenizer": calibrator.tokenizer.backend_tokenizer.to_str(),
            "record": json.dumps(calibrator.record),
            **surroundings(),
        }

    before = state()
    processor = FusionLogitsProcessor(calibrator, tokenizer, CONTRAST)
    Calibrator.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    for how in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}):
        model.generate(ids, do_sample=False, logits_processor=[processor], **how, **common)
    scores = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(0))
    processor.with_strength(ids, scores)
    with pytest.raises(VocabularyError):
        processor(ids, torch.zeros(1, 9000))
    interrupt(processor, 1, ids, scores)
    pickle.loads(pickle.dumps(processor))(ids, scores)
    copy.deepcopy(processor)(ids, scores)
    processor.reset()
    after = state()
    assert {name for name in before if before[name] != after[name]} == set()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_results_carry_no_graph_and_no_inference_tensors(pristine):
    """Scores may require gradients, and training may follow a call in inference mode."""
    processor = fresh(pristine("other_tokenizer"))
    ids = torch.tensor([[20, 21, 22]])
    width = len(processor.vocabulary.mapped)
    with torch.inference_mode():
        first = processor(ids, scores_for([(1,)], width))
    scores = scores_for([(1,)], width).requires_grad_()
    with torch.enable_grad():
        second = processor(ids, scores)
    torch.testing.assert_close(first, second.detach(), **EXACT)
    second[0, 30].backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize(
    "vocabulary",
    [
        "byte_tokenizer",
        "other_tokenizer",
        "sentencepiece_tokenizer",
    ],
)
def test_the_callers_autocast_does_not_matter(pristine, request, vocabulary):
    tokenizer = request.getfixturevalue(vocabulary)
    world = World(pristine(vocabulary), tokenizer)
    rows = [world.texts[0][:3], world.texts[2][:3], world.texts[3][:3]]
    world.check(rows)
    longer = [(*row, 20) for row in rows]
    wanted = [world.wanted(row) for row in longer]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = world.processor(torch.tensor(longer), scores_for(longer, world.size))
    torch.testing.assert_close(found, torch.stack(wanted), **EXACT)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "config"),
    [
        ("byte_tokenizer", torch.float64, "contrast"),
        ("byte_tokenizer", torch.bfloat16, "contrast"),
        ("other_tokenizer", torch.float64, "contrast"),
        ("other_tokenizer", torch.bfloat16, "contrast"),
        ("byte_tokenizer", torch.bfloat16, "context"),
        ("other_tokenizer", torch.float64, "context"),
    ],
)
def test_the_default_dtype_does_not_matter(pristine, request, vocabulary, dtype, config):
    """Loading a model sets it for the whole process, so another thread may see any value."""
    tokenizer = request.getfixturevalue(vocabulary)
    world = World(pristine(vocabulary, config), tokenizer)
    row = world.texts[0]
    wanted, scores = world.wanted(row), scores_for([row], world.size)
    torch.set_default_dtype(dtype)
    try:
        settings = world.pristine.config
        built = FusionLogitsProcessor(world.pristine.calibrator, tokenizer, settings)
        found = built(torch.tensor([row]), scores)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found[0], wanted, **EXACT)


def test_a_map_built_in_autocast_is_the_same(pristine, request, monkeypatch, tmp_path):
    """The map is stored on disk, for processes that know nothing of the autocast."""
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path))
    tokenizer = request.getfixturevalue("other_tokenizer")
    wanted = pristine("other_tokenizer").vocabulary._static
    with torch.autocast("cpu", dtype=torch.bfloat16):
        built = FusionLogitsProcessor(pristine("other_tokenizer").calibrator, tokenizer, CONTRAST)
    for name, tensor in built.vocabulary._static.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_rows_without_a_distribution_are_returned_unchanged(pristine, value):
    """Scores without a softmax are returned unchanged, so that the caller can find the cause."""
    processor = fresh(pristine("other_tokenizer"))
    scores = scores_for([(1,), (2,)], len(processor.vocabulary.mapped))
    scores[0, 7 if value > 0 else slice(None)] = value
    found = processor(torch.tensor([[20, 21], [20, 22]]), scores)
    assert torch.equal(found[0], scores[0])


def test_quiet_loading_in_threads_restores_log_settings():
    """The threads leave in the order in which they entered, which nesting never does."""
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    first, second = quiet_transformers(), quiet_transformers()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert transformers_logging.get_verbosity() == logging.CRITICAL
    second.__exit__(None, None, None)
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before
