"""MLX-LM: the processor equals the definition, on a stand-in and in MLX-LM on the CPU."""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from fusion_detox import FusionConfig, FusionLogitsProcessor
from fusion_detox.errors import ConfigError, DataError, MissingExtraError

INSTALLED = importlib.util.find_spec("mlx_lm") is not None
SKIP = 'mlx-lm is not installed: pip install "mlx-lm[cpu]"'
NAME = "fusion_detox.integrations.mlx_lm"
CONFIG = FusionConfig(strength=2.0, plausibility=0.0)
TEXTS = ["You are a complete idiot and nobody", "The weather", "Shut up, you"]
STEPS = 8


class Array(np.ndarray):
    """As much of ``mlx.core.array`` as a logits processor needs."""


def stand_in():
    core = types.ModuleType("mlx.core")
    core.float32 = np.float32
    core.array = lambda values, dtype=None: np.array(values, dtype=dtype).view(Array)
    package = types.ModuleType("mlx")
    package.core = core
    return {"mlx": package, "mlx.core": core}


@pytest.fixture
def fake(monkeypatch):
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture
def engine(monkeypatch):
    if not INSTALLED:
        pytest.skip(SKIP)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture
def target(make_llama, other_tokenizer):
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return make_llama(len(other_tokenizer), seed=7, **ends)


@pytest.fixture
def processor(calibrator, other_tokenizer):
    return FusionLogitsProcessor(calibrator, other_tokenizer, CONFIG, verify="off")


@pytest.fixture
def prompts(other_tokenizer):
    return [other_tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def by_definition(target, processor, ids, strength=None, steps=STEPS):
    ids = list(ids)
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            logits = target(torch.tensor([ids])).logits[0, -1:]
        ids.append(int(processor.fuse_rows([ids], logits, strength)[0].argmax()))
    return ids[start:]


@pytest.mark.parametrize("hidden", [0, "all but the last"])
def test_the_whole_text_is_read_however_much_is_shown(fake, target, processor, prompts, hidden):
    """MLX-LM shows the whole text, or leaves out all of the prompt but its last id."""
    core, ids = fake.mx, list(prompts[0])
    hidden = len(ids) - 1 if hidden else 0
    step = fake.MLXFusion(processor, ids)
    expected = by_definition(target, processor, ids)
    for _ in range(STEPS):
        with torch.no_grad():
            logits = core.array(target(torch.tensor([ids])).logits[0, -1:].numpy())
        before = logits.copy()
        fused = step(core.array(ids[hidden:]), logits)
        assert np.array_equal(before, logits)
        assert fused.shape == logits.shape
        ids.append(int(fused[0].argmax()))
    assert ids[len(prompts[0]) :] == expected


def test_another_text_than_the_prompt_is_refused(fake, processor, prompts):
    core, scores = fake.mx, fake.mx.array(np.zeros((1, 441), dtype=np.float32))
    step = fake.MLXFusion(processor, prompts[0])
    step(core.array(prompts[0]), scores)
    with pytest.raises(ConfigError, match="make one MLXFusion for each request"):
        step(core.array(prompts[1]), scores)


@pytest.mark.serves("MLX-LM", "bad request fails alone")
def test_wrong_use(fake, processor):
    for bad in (-1.0, float("nan"), "strong"):
        with pytest.raises(ConfigError, match="strength must be a number"):
            fake.MLXFusion(processor, [5], strength=bad)
    with pytest.raises(DataError, match="the prompt is empty"):
        fake.MLXFusion(processor, [])
    several = processor.with_settings(strength=[1.0, 2.0])
    with pytest.raises(ConfigError, match="MLXFusion"):
        fake.MLXFusion(several, [5])


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx", None)
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(MissingExtraError, match="mlx-lm"):
        importlib.import_module(NAME)


@pytest.fixture
def loaded(engine, target, other_tokenizer, tmp_path):
    from mlx_lm import load

    target.save_pretrained(tmp_path)
    other_tokenizer.save_pretrained(tmp_path)
    return load(str(tmp_path))


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.serves("MLX-LM", "strength per request")
@pytest.mark.serves("MLX-LM", "drafts")
@pytest.mark.serves("MLX-LM", "run on the engine")
def test_generation_in_mlx_lm(engine, loaded, target, processor, prompts, drafts):
    """With drafts, the target is its own draft model."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step, speculative_generate_step

    model, _ = loaded
    for ids, strength in zip(prompts, (None, 0.0, 0.7), strict=True):
        step = engine.MLXFusion(processor, ids, strength)
        options = {"max_tokens": STEPS, "logits_processors": [step]}
        if drafts:
            found = speculative_generate_step(mx.array(ids), model, loaded[0], **options)
        else:
            found = generate_step(mx.array(ids), model, **options)
        assert [token for token, *_ in found] == by_definition(target, processor, ids, strength)


@pytest.mark.serves("MLX-LM", "batches")
def test_a_batch_in_mlx_lm(engine, loaded, target, processor, prompts):
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(loaded[0], max_tokens=STEPS)
    strengths = (None, 0.0, 0.7)
    steps = [
        [engine.MLXFusion(processor, ids, strength)]
        for ids, strength in zip(prompts, strengths, strict=True)
    ]
    names = generator.insert(prompts, logits_processors=steps)
    found = {name: [] for name in names}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    for name, ids, strength in zip(names, prompts, strengths, strict=True):
        assert found[name] == by_definition(target, processor, ids, strength)
