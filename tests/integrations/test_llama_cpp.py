"""llama.cpp: the adapter equals ``generate``, on a stand-in, on llama.cpp itself and on SmolLM2."""

import importlib
import importlib.util
import sys

import numpy as np
import pytest
import torch

from fusion_detox import FusionConfig, FusionLogitsProcessor
from fusion_detox.errors import ConfigError, MissingExtraError, ModelError, VocabularyError
from fusion_detox.vocabulary.token_table import TokenTable
from tests.gguf_files import write_gguf
from tests.integrations import fake_llama

INSTALLED = importlib.util.find_spec("llama_cpp") is not None
SKIP = 'llama-cpp-python is not installed: pip install -e ".[llama-cpp]" (builds llama.cpp)'
NAME = "fusion_detox.integrations.llama_cpp"
CONFIG = FusionConfig(strength=2.0, plausibility=0.0)
PROMPT = "You are a complete"
REPEATED = "one two. one two. one two. one"


class Drafts:
    """Drafts that are sometimes right: what followed the last token earlier in the text."""

    def __init__(self):
        self.lengths = []

    def __call__(self, ids, **_):
        places = np.flatnonzero(ids[:-1] == ids[-1])
        found = ids[places[-1] + 1 :][:3] if len(places) else ids[:2]
        self.lengths.append(len(found))
        return found.astype(np.intc)


@pytest.fixture(params=["fake", "engine"])
def setting(request, monkeypatch, tmp_path, byte_tokenizer, make_llama):
    """The adapter's module, and a function that opens the target with or without drafts."""
    target = make_llama(len(byte_tokenizer), seed=5)
    path = tmp_path / "model.gguf"
    write_gguf(path, target, byte_tokenizer)
    if request.param == "engine":
        if not INSTALLED:
            pytest.skip(SKIP)
        from llama_cpp import Llama

        def start(draft_model=None):
            return Llama(str(path), n_ctx=64, verbose=False, n_threads=1, draft_model=draft_model)
    else:
        monkeypatch.setitem(sys.modules, "llama_cpp", fake_llama.module)
        table = TokenTable.from_tokenizer(byte_tokenizer)
        texts = [text or b"<|endoftext|>" for text in table.token_bytes]

        def start(draft_model=None):
            return fake_llama.Llama(target, byte_tokenizer, texts, str(path), draft_model)

    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    yield module, start, target
    sys.modules.pop(NAME, None)


@pytest.fixture
def expected(calibrator, byte_tokenizer):
    def generate(target, prompt, strength, steps):
        """Greedy search with the processor itself."""
        processor = FusionLogitsProcessor(calibrator, byte_tokenizer, CONFIG, verify="off")
        ids = byte_tokenizer(prompt)["input_ids"]
        for _ in range(steps):
            with torch.no_grad():
                logits = target(torch.tensor([ids])).logits[0, -1:]
            ids.append(int(processor.fuse_rows([ids], logits, strength)[0].argmax()))
        return ids

    return generate


def text_of(result):
    return result["choices"][0]["text"]


def ids_of(llama, count):
    """The first ids that were evaluated; the engine may end a text between two bytes later."""
    assert llama.n_tokens >= count
    return llama.input_ids[:count].tolist()


@pytest.mark.serves("llama.cpp", "strength per request")
def test_equals_greedy_search_at_each_strength(setting, calibrator, expected):
    """Three calls of one Llama, so the engine also reuses prefixes."""
    module, start, target = setting
    llama = start()
    fusion = module.LlamaFusion(llama, calibrator, CONFIG, verify="off")
    found = {}
    for strength in (None, 0.0, 0.7, None):
        fusion.create_completion(PROMPT, strength=strength, max_tokens=8, temperature=0.0)
        ids = expected(target, PROMPT, 2.0 if strength is None else strength, 7)
        assert ids_of(llama, len(ids)) == ids
        found[strength] = tuple(ids)
    assert len(set(found.values())) == 3, "the strengths make a difference"


@pytest.mark.serves("llama.cpp", "drafts")
def test_drafts_are_cut_off_and_the_text_stays_the_same(setting, calibrator, expected):
    module, start, target = setting
    drafts = Drafts()
    llama = start(drafts)
    fusion = module.LlamaFusion(llama, calibrator, CONFIG, verify="off")
    read = []
    fuse = module.fuse_array

    def watched(processor, rows, scores, strength):
        read.append((len(rows[0]), llama.n_tokens))
        return fuse(processor, rows, scores, strength)

    module.fuse_array = watched
    fusion.create_completion(REPEATED, max_tokens=12, temperature=0.0)
    ids = expected(target, REPEATED, 2.0, 11)
    assert ids_of(llama, len(ids)) == ids
    assert any(length < evaluated for length, evaluated in read), "no draft was ever evaluated"
    assert max(drafts.lengths) > 0


def test_logit_bias_does_not_switch_fusion_off(setting, calibrator, expected, byte_tokenizer):
    """llama-cpp-python replaces the processors by what ``list.extend`` returns: nothing."""
    module, start, target = setting
    llama = start()
    fusion = module.LlamaFusion(llama, calibrator, CONFIG, verify="off")
    fusion.create_completion(
        PROMPT, max_tokens=8, temperature=0.0, logit_bias={byte_tokenizer.eos_token_id: 0.0}
    )
    ids = expected(target, PROMPT, 2.0, 7)
    assert ids_of(llama, len(ids)) == ids


def test_scores_are_not_changed_in_place(setting, calibrator):
    module, start, _ = setting
    llama = start()
    fusion = module.LlamaFusion(llama, calibrator, CONFIG, verify="off")
    step = module._Step(llama, fusion.processor, 2.0)
    ids = np.arange(1, 6, dtype=np.intc)
    scores = np.random.default_rng(0).normal(size=llama.n_vocab()).astype(np.single)
    scores[7], before = -np.inf, scores.copy()
    before[7] = -np.inf
    fused = step(ids, scores)
    assert np.array_equal(scores, before)
    assert fused.dtype == np.single
    assert fused.shape == scores.shape
    assert fused[7] == -np.inf
    step.raise_error()


def test_a_failure_ends_the_text_and_is_raised(setting, calibrator, monkeypatch):
    """ctypes drops the error; without the adapter's care, the text would go on unfused."""
    module, start, _ = setting
    fusion = module.LlamaFusion(start(), calibrator, CONFIG, verify="off")
    calls = []

    def fails_at_the_third(processor, rows, scores, strength):
        calls.append(rows)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return scores

    monkeypatch.setattr(module, "fuse_array", fails_at_the_third)
    chunks = []
    stream = fusion.create_completion(PROMPT, max_tokens=9, temperature=0.0, stream=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        chunks.extend(map(text_of, stream))
    assert len(calls) == 3
    assert len([text for text in chunks if text]) <= 2
    calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        fusion.create_completion(PROMPT, max_tokens=9, temperature=0.0)
    calls.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        fusion.create_chat_completion(
            [{"role": "user", "content": PROMPT}], max_tokens=9, temperature=0.0
        )


@pytest.mark.serves("llama.cpp", "bad request fails alone")
def test_a_bad_strength_is_refused_before_anything_is_generated(setting, calibrator):
    module, start, _ = setting
    llama = start()
    fusion = module.LlamaFusion(llama, calibrator, CONFIG, verify="off")
    for bad in (-1.0, float("nan"), "strong", True):
        with pytest.raises(ConfigError, match="strength must be a number"):
            fusion.create_completion(PROMPT, strength=bad, max_tokens=2)
    assert llama.n_tokens == 0


def test_a_tokenizer_of_another_model_is_refused(setting, calibrator, other_tokenizer):
    module, start, _ = setting
    with pytest.raises(VocabularyError, match="pass the tokenizer of this model"):
        module.LlamaFusion(start(), calibrator, CONFIG, tokenizer=other_tokenizer)


def test_a_processor_before_fusion_is_refused_with_drafts(setting, calibrator):
    module, start, _ = setting
    llama = start(Drafts())
    fusion = module.LlamaFusion(llama, calibrator, CONFIG, verify="off")
    step = module._Step(llama, fusion.processor, 2.0)
    fusion.create_completion(PROMPT, max_tokens=1, temperature=0.0)
    end = step(llama.input_ids[: llama.n_tokens], llama.scores[0] + 1)
    assert int(end.argmax()) == llama.token_eos()
    with pytest.raises(ConfigError, match="no other logits processor before the fusion"):
        step.raise_error()


def test_a_file_without_a_tokenizer_is_named(setting, tmp_path):
    module = setting[0]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and no more")
    with pytest.raises(ModelError, match=r"tokenizer of .*broken\.gguf cannot be read"):
        module.read_tokenizer(broken)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(MissingExtraError, match="llama-cpp"):
        importlib.import_module(NAME)


@pytest.mark.real_target
@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason=SKIP)
@pytest.mark.serves("llama.cpp", "run on the engine")
def test_smollm2_equals_the_transformers_path(smollm2):
    """Same scores in, same scores out, bit for bit; and the same tokens but for quantisation.

    transformers holds the dequantised weights of this GGUF file. llama.cpp also rounds the
    activations to 8 bits, so its logits differ.
    """
    from llama_cpp import Llama

    from fusion_detox.files.packaged_targets import packaged_gguf
    from fusion_detox.integrations.llama_cpp import LlamaFusion, _Step

    model, tokenizer = smollm2
    llama = Llama(str(packaged_gguf("smollm2")), n_ctx=128, verbose=False, logits_all=True)
    fusion = LlamaFusion(llama)
    processor = FusionLogitsProcessor("english-16k", tokenizer)
    step = _Step(llama, fusion.processor, processor.config.strength)
    largest = 0.0
    for prompt in (PROMPT, "Shut up, you", "The weather was fine, so we"):
        ids = tokenizer(prompt)["input_ids"]
        assert llama.tokenize(prompt.encode(), add_bos=False) == ids
        llama.reset()
        for index in range(10):
            llama.eval(ids if index == 0 else ids[-1:])
            scores = llama.scores[llama.n_tokens - 1].copy()
            mine = step(llama.input_ids[: llama.n_tokens], scores)
            same = processor(torch.tensor([ids]), torch.from_numpy(scores)[None])[0].numpy()
            assert np.array_equal(mine, same)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[:, -1]
            theirs = processor(torch.tensor([ids]), logits)[0].numpy()
            unfused = torch.log_softmax(logits, -1)[0]
            moved = unfused - torch.log_softmax(torch.from_numpy(scores), -1)
            largest = max(largest, float(moved[unfused > np.log(1e-3)].abs().max()))
            first, second = np.sort(theirs)[[-1, -2]]
            assert mine.argmax() == theirs.argmax() or first - second < 0.5
            ids = [*ids, int(mine.argmax())]
    assert largest < 0.8, "nats, before fusion, of tokens with a probability above 0.001"
