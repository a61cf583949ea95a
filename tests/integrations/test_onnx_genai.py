"""ONNX Runtime GenAI: the loop equals the definition, on a stand-in and on the engine itself."""

import importlib
import importlib.util
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from fusion_detox import FusionConfig, FusionLogitsProcessor
from fusion_detox.errors import ConfigError, DataError, MissingExtraError

INSTALLED = all(map(importlib.util.find_spec, ("onnxruntime_genai", "onnx_ir", "onnx")))
SKIP = 'onnxruntime-genai is not installed: pip install -e ".[onnx-genai]"'
NAME = "fusion_detox.integrations.onnx_genai"
CONFIG = FusionConfig(strength=2.0, plausibility=0.0)
TEXTS = ["You are a complete idiot and nobody", "The weather", "Shut up, you", "In 1987"]
STEPS = 8


class Model:
    def __init__(self, target):
        self.target = target


class Tokenizer:
    eos_token_ids = np.array([2])
    pad_token_id = 0

    def __init__(self, model):
        pass


class GeneratorParams:
    def __init__(self, model):
        self.options = {}

    def set_search_options(self, **options):
        self.options.update(options)


class Generator:
    """The documented behaviour of version 0.18: right padding stays inside the sequences."""

    def __init__(self, model, parameters):
        self.target, self.options = model.target, parameters.options
        self.done = np.zeros(self.options["batch_size"], dtype=bool)

    def append_tokens(self, tokens):
        assert tokens.dtype == np.int32
        self.sequences = tokens.tolist()
        self.texts = [[id for id in row if id] for row in self.sequences]
        self._forward()

    def _forward(self):
        with torch.no_grad():
            rows = [self.target(torch.tensor([text])).logits[0, -1] for text in self.texts]
        self.logits = torch.stack(rows)[:, None].numpy()

    def get_logits(self):
        return self.logits

    def set_logits(self, logits):
        assert logits.shape == self.logits.shape
        assert logits.dtype == self.logits.dtype
        self.logits = logits

    def generate_next_token(self):
        self.next = np.where(self.done, Tokenizer.pad_token_id, self.logits[:, -1].argmax(-1))
        self.done |= np.isin(self.next, Tokenizer.eos_token_ids)
        for row, id in enumerate(self.next.tolist()):
            self.sequences[row].append(id)
            self.texts[row].append(id)
        self._forward()

    def get_next_tokens(self):
        return self.next.astype(np.int32)

    def is_done(self):
        return bool(self.done.all()) or len(self.sequences[0]) >= self.options["max_length"]


def stand_in():
    module = types.ModuleType("onnxruntime_genai")
    for part in (Model, Tokenizer, GeneratorParams, Generator):
        setattr(module, part.__name__, part)
    return module


@pytest.fixture(scope="module")
def target(make_llama, other_tokenizer):
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    # The attention kernel of ONNX Runtime needs heads of a multiple of 16.
    return make_llama(len(other_tokenizer), seed=7, hidden_size=64, **ends)


@pytest.fixture(scope="module")
def exported(target, other_tokenizer, tmp_path_factory):
    """The target as ONNX, written by the engine's own model builder."""
    if not INSTALLED:
        pytest.skip(SKIP)
    folder = tmp_path_factory.mktemp("onnx")
    target.save_pretrained(folder / "target")
    other_tokenizer.save_pretrained(folder / "target")
    paths = ["-i", str(folder / "target"), "-o", str(folder / "out"), "-c", str(folder / "cache")]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "tiny"]
    subprocess.run([*builder, *paths, "-p", "fp32", "-e", "cpu"], check=True, capture_output=True)
    return str(folder / "out")


@pytest.fixture(params=["fake", "engine"])
def setting(request, monkeypatch, target):
    """The adapter's module and the target as the engine's model."""
    if request.param == "engine":
        folder = request.getfixturevalue("exported")
    else:
        monkeypatch.setitem(sys.modules, "onnxruntime_genai", stand_in())
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    yield module, module.og.Model(folder if request.param == "engine" else target)
    sys.modules.pop(NAME, None)


@pytest.fixture
def processor(calibrator, other_tokenizer):
    return FusionLogitsProcessor(calibrator, other_tokenizer, CONFIG, verify="off")


@pytest.fixture
def prompts(other_tokenizer):
    return [other_tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def by_definition(target, processor, ids, strength):
    """Greedy search, one prompt at a time."""
    ids = list(ids)
    start = len(ids)
    for _ in range(STEPS):
        with torch.no_grad():
            logits = target(torch.tensor([ids])).logits[0, -1:]
        ids.append(int(processor.fuse_rows([ids], logits, strength)[0].argmax()))
        if ids[-1] == 2:
            break
    return ids[start:]


@pytest.mark.serves("ONNX Runtime GenAI", "strength per request")
@pytest.mark.serves("ONNX Runtime GenAI", "batches")
@pytest.mark.serves("ONNX Runtime GenAI", "run on the engine")
def test_a_ragged_batch_with_a_strength_per_prompt(setting, target, processor, prompts):
    """Rows in order, each with its own strength; the padding inside a sequence is not read."""
    module, model = setting
    strengths = [None, 0.0, 0.7, 3.0]
    found = module.generate(model, prompts, processor, max_new_tokens=STEPS, strengths=strengths)
    for ids, strength, new in zip(prompts, strengths, found, strict=True):
        expected = by_definition(target, processor, ids, 2.0 if strength is None else strength)
        # A shorter prompt may write more tokens until the longest reaches the maximum.
        assert new[: len(expected)] == expected
    plain = module.generate(model, prompts, processor, max_new_tokens=STEPS, strengths=[0] * 4)
    assert plain[1] == found[1]
    assert plain[0] != found[0]


def test_logits_are_set_not_changed_in_place(setting, target, processor, prompts):
    module, model = setting
    parameters = module.og.GeneratorParams(model)
    parameters.set_search_options(max_length=40, batch_size=1, do_sample=False)
    generator = module.og.Generator(model, parameters)
    generator.append_tokens(np.array(prompts[:1], dtype=np.int32))
    before = np.array(generator.get_logits())
    module.fuse_logits(generator, processor, prompts[:1])
    expected = processor.fuse_rows(prompts[:1], torch.from_numpy(before[:, -1]))
    assert np.array_equal(generator.get_logits()[:, -1], expected.numpy())


@pytest.mark.serves("ONNX Runtime GenAI", "beams", "refused")
def test_wrong_use(setting, processor, prompts):
    module, model = setting
    for options, error, message in (
        ({"strengths": [1.0]}, ConfigError, "1 strengths were given for 4 prompts"),
        ({"strengths": [1, 1, -1, 1]}, ConfigError, "strength must be a number"),
        ({"strengths": [1, 1, float("nan"), 1]}, ConfigError, "strength must be a number"),
        ({"num_beams": 2}, ConfigError, "num_beams must be 1"),
    ):
        with pytest.raises(error, match=message):
            module.generate(model, prompts, processor, max_new_tokens=2, **options)
    with pytest.raises(DataError, match="a prompt is empty"):
        module.generate(model, [[5], []], processor, max_new_tokens=2)
    several = processor.with_settings(strength=[1.0, 2.0])
    with pytest.raises(ConfigError, match="strengths="):
        module.generate(model, prompts, several, max_new_tokens=2)
    assert module.generate(model, [], processor, max_new_tokens=2) == []


def test_several_beams_in_an_own_loop_are_refused(setting, processor, prompts):
    module, model = setting
    if isinstance(model, Model):
        pytest.skip("the stand-in has no beams")
    parameters = module.og.GeneratorParams(model)
    parameters.set_search_options(max_length=40, num_beams=3, do_sample=False)
    generator = module.og.Generator(model, parameters)
    generator.append_tokens(np.array(prompts[0], dtype=np.int32))
    with pytest.raises(ConfigError, match="3 rows of logits for 1 texts"):
        module.fuse_logits(generator, processor, prompts[:1])


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(MissingExtraError, match="onnx-genai"):
        importlib.import_module(NAME)
