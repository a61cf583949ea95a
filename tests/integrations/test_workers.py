"""Engines with worker processes: SGLang, TensorRT-LLM and LMDeploy, on stand-ins.

Each stand-in passes exactly what the engine documents: histories, order of rows, beams, padding,
and rows of drafts. None of these engines runs without a GPU.
"""

import importlib
import json
import logging
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from fusion_detox import Calibrator, FusionLogitsProcessor
from fusion_detox.errors import ConfigError, MissingExtraError
from fusion_detox.integrations import workers
from fusion_detox.integrations.workers import Source

ENGINES = "fusion_detox.integrations."
END = 2
SETTINGS = {"strength": 2.0, "plausibility": 0.0}


@pytest.fixture
def names(calibrator_folder, target_folder, tmp_path_factory, monkeypatch):
    """The names that travel to the workers."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(base / "maps"))
    workers._load.cache_clear()
    yield {"tokenizer": str(target_folder), "calibrator": str(calibrator_folder)}
    workers._load.cache_clear()


@pytest.fixture
def processor(names, other_tokenizer):
    calibrator = Calibrator.from_pretrained(names["calibrator"])
    config = calibrator.config.replace(**SETTINGS)
    return FusionLogitsProcessor(calibrator, other_tokenizer, config)


@pytest.fixture
def texts(other_tokenizer):
    sentences = ("You are a complete idiot and", "The weather", "Shut up, you")
    return [other_tokenizer(text, add_special_tokens=False)["input_ids"] for text in sentences]


@pytest.fixture
def scores(other_tokenizer):
    return torch.randn(3, len(other_tokenizer) + 3, generator=torch.manual_seed(0)) * 3


def engine(monkeypatch, name, modules):
    """The adapter, on top of a stand-in for the engine."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, ENGINES + name, raising=False)
    return importlib.import_module(ENGINES + name)


def module(name, **parts):
    result = types.ModuleType(name)
    for key, value in parts.items():
        setattr(result, key, value)
    return result


def only_ends(row):
    return int(row.argmax()) == END and int(row.isfinite().sum()) == 1


# SGLang


@pytest.fixture
def sglang(monkeypatch, names):
    class CustomLogitProcessor:
        @classmethod
        def to_str(cls):
            return json.dumps({"callable": f"{cls.__module__}.{cls.__name__}"})

    packages = ["sglang", "sglang.srt", "sglang.srt.sampling"]
    last = module(
        "sglang.srt.sampling.custom_logit_processor", CustomLogitProcessor=CustomLogitProcessor
    )
    monkeypatch.setenv("FUSION_DETOX_TOKENIZER", names["tokenizer"])
    monkeypatch.setenv("FUSION_DETOX_CALIBRATOR", names["calibrator"])
    monkeypatch.setenv("FUSION_DETOX_SETTINGS", json.dumps(SETTINGS))
    return engine(monkeypatch, "sglang", [*map(module, packages), last])


def apply_in_sglang(adapter, logits, requests):
    """How SGLang applies a processor: a new instance, and only the rows that name it."""
    mask = torch.tensor([params is not False for _, params in requests])
    chosen = [params for _, params in requests if params is not False]
    for request, params in requests:
        if isinstance(params, dict):  # the request puts itself into its own dictionary
            params["__req__"] = request
    logits[mask] = adapter.SGLangFusion()(logits[mask], chosen)
    return logits


def sglang_request(name, prompt, output=()):
    return SimpleNamespace(rid=name, origin_input_ids=list(prompt), output_ids=list(output))


@pytest.mark.serves("SGLang", "strength per request")
@pytest.mark.serves("SGLang", "batches")
def test_sglang_rows_keep_their_order_and_strength(sglang, processor, texts, scores):
    requests = [
        (sglang_request("a", texts[0][:4], texts[0][4:]), {"strength": 0.5}),
        (sglang_request("other", texts[1]), False),
        (sglang_request("c", texts[2]), {}),
    ]
    found = apply_in_sglang(sglang, scores.clone(), requests)
    expected = processor.fuse_rows([texts[0], texts[2]], scores[[0, 2]], [0.5, 2.0])
    assert torch.equal(found[[0, 2]], expected)
    assert torch.equal(found[1], scores[1])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"strength": -1}, "strength must be a number"),
        ({"strength": float("nan")}, "strength must be a number"),
        ({"strength": "strong"}, "strength must be a number"),
        ({"strengt": 1.0}, "unknown custom_params: strengt"),
        (None, "the request has no custom_params"),
    ],
)
@pytest.mark.serves("SGLang", "bad request fails alone")
def test_sglang_ends_a_bad_request_alone(sglang, processor, texts, scores, caplog, bad, message):
    requests = [
        (sglang_request("a", texts[0]), {}),
        (sglang_request("b", texts[1]), bad),
        (sglang_request("c", texts[2]), {}),
    ]
    with caplog.at_level(logging.ERROR):
        found = apply_in_sglang(sglang, scores.clone(), requests)
    assert message in caplog.text
    assert only_ends(found[1])
    expected = processor.fuse_rows([texts[0], texts[2]], scores[[0, 2]])
    assert torch.equal(found[[0, 2]], expected)


@pytest.mark.serves("SGLang", "drafts", "refused")
def test_sglang_drafts_are_never_fused_with_a_wrong_text(sglang, texts, scores, caplog):
    """With drafts, SGLang passes several rows per request, and the text of none of them."""
    params = {"__req__": sglang_request("a", texts[0])}
    with caplog.at_level(logging.ERROR):
        found = sglang.SGLangFusion()(scores, [params])
    assert all(map(only_ends, found))
    assert "speculative decoding" in caplog.text


def test_sglang_texts_that_lag_are_noticed(sglang, texts, scores, caplog):
    request = sglang_request("lagging", texts[0], [5])
    for output in ([5], [5, 6]):
        request.output_ids = output
        apply_in_sglang(sglang, scores[:1].clone(), [(request, {})])
    assert caplog.text == ""
    apply_in_sglang(sglang, scores[:1].clone(), [(request, {})])
    assert "--disable-overlap-schedule" in caplog.text


def test_sglang_sends_a_name_only(sglang):
    assert json.loads(sglang.SGLangFusion.to_str()) == {"callable": f"{ENGINES}sglang.SGLangFusion"}


# TensorRT-LLM


@pytest.fixture
def tensorrt(monkeypatch, names):
    parts = {"LogitsProcessor": type("L", (), {}), "BatchedLogitsProcessor": type("B", (), {})}
    last = module("tensorrt_llm.sampling_params", **parts)
    return engine(monkeypatch, "tensorrt_llm", [module("tensorrt_llm"), last])


@pytest.mark.serves("TensorRT-LLM", "beams")
def test_tensorrt_beams_are_rows_in_place(tensorrt, names, processor, texts, scores):
    fusion = tensorrt.TensorRTFusion(**names, **SETTINGS)
    logits = scores[None].clone()
    same = logits
    assert fusion(7, logits, texts, None, None) is None
    assert same is logits
    assert torch.equal(logits[0], processor.fuse_rows(texts, scores))


@pytest.mark.serves("TensorRT-LLM", "strength per request")
def test_tensorrt_each_request_has_its_strength(tensorrt, names, processor, texts, scores):
    for row, strength in enumerate((0.0, 0.5, 2.0)):
        fusion = tensorrt.TensorRTFusion(**names, strength=strength, plausibility=0.0)
        logits = scores[None, row : row + 1].clone()
        fusion(row, logits, [texts[row]], None, None)
        expected = processor.fuse_rows([texts[row]], scores[[row]], strength)
        assert torch.equal(logits[0], expected)


@pytest.mark.serves("TensorRT-LLM", "batches")
def test_tensorrt_batched(tensorrt, names, processor, texts, scores):
    """A request with two beams, then one with a single beam; the others keep their place."""
    fusion = tensorrt.BatchedTensorRTFusion(tensorrt.TensorRTFusion(**names, **SETTINGS))
    logits = [scores[None, :2].clone(), scores[None, 2:].clone()]
    fusion([1, 2], logits, [texts[:2], texts[2:]], None, [None, None])
    found = torch.cat([part[0] for part in logits])
    assert torch.equal(found, processor.fuse_rows(texts, scores))


@pytest.mark.serves("TensorRT-LLM", "drafts", "refused")
def test_tensorrt_ends_requests_with_drafts_alone(
    tensorrt, names, processor, texts, scores, caplog
):
    fusion = tensorrt.BatchedTensorRTFusion(tensorrt.TensorRTFusion(**names, **SETTINGS))
    logits = [scores[None, :2].clone(), scores[None, 2:].clone()]
    fusion([1, 2], logits, [texts[:1], texts[2:]], None, [None, None])
    assert all(map(only_ends, logits[0][0]))
    assert torch.equal(logits[1][0], processor.fuse_rows(texts[2:], scores[2:]))
    assert "2 rows of logits came for 1 beams" in caplog.text


@pytest.mark.serves("TensorRT-LLM", "bad request fails alone")
def test_tensorrt_refuses_bad_settings_at_the_client(tensorrt, names):
    for bad in ({"strength": -1}, {"strength": float("nan")}, {"strengt": 1}):
        with pytest.raises(ConfigError, match="strengt"):
            tensorrt.TensorRTFusion(**names, **bad)


# LMDeploy


@pytest.fixture
def lmdeploy(monkeypatch, names):
    return engine(monkeypatch, "lmdeploy", [])


def apply_in_lmdeploy(processors, texts, logits, pad):
    """How LMDeploy's engine calls processors: row by row, with histories padded on the left."""
    longest = max(map(len, texts))
    ids = torch.tensor([[pad] * (longest - len(text)) + text for text in texts])
    for row, processor in enumerate(processors):
        if processor is not None:
            logits[row] = processor(ids[row], logits[row])
    return logits


@pytest.mark.serves("LMDeploy", "strength per request")
@pytest.mark.serves("LMDeploy", "batches")
def test_lmdeploy_reads_no_padding(lmdeploy, names, processor, texts, scores):
    """The padding is the model's BOS token, 1 here; the second row has no processor."""
    fusion = lmdeploy.LMDeployFusion(**names, **SETTINGS)
    weak = lmdeploy.LMDeployFusion(**names, strength=0.5, plausibility=0.0)
    found = apply_in_lmdeploy([fusion, None, weak], texts, scores.clone(), pad=1)
    expected = processor.fuse_rows([texts[0], texts[2]], scores[[0, 2]], [2.0, 0.5])
    torch.testing.assert_close(found[[0, 2]], expected)
    assert torch.equal(found[1], scores[1])
    other = lmdeploy.LMDeployFusion(**names, **SETTINGS, pad_token_id=0)
    again = apply_in_lmdeploy([other] * 3, texts, scores.clone(), pad=0)
    torch.testing.assert_close(again, processor.fuse_rows(texts, scores))


@pytest.mark.serves("LMDeploy", "bad request fails alone")
def test_lmdeploy_ends_a_row_that_fails(lmdeploy, names, texts, scores, caplog):
    fusion = lmdeploy.LMDeployFusion(**names, **SETTINGS)
    wide = torch.zeros(len(scores[0]) + 100_000)
    assert only_ends(fusion(torch.tensor(texts[0]), wide))
    assert "columns, but the tokenizer has" in caplog.text
    with pytest.raises(ConfigError, match="strength must be a number"):
        lmdeploy.LMDeployFusion(**names, strength=-1)


# Workers


def test_the_processor_is_loaded_once_per_process(names):
    first, again = Source(**names).load(), Source(**names).load()
    assert first.processor is again.processor
    assert (first.start_id, first.end_id) == (1, END)
    assert Source(**names, settings='{"strength": 3.0}').load().processor.config.strength == 3.0


def test_wrong_server_settings_are_explained(names, monkeypatch):
    monkeypatch.delenv("FUSION_DETOX_TOKENIZER", raising=False)
    with pytest.raises(ConfigError, match="FUSION_DETOX_TOKENIZER is not set"):
        Source.from_environment()
    for settings, message in (
        ("strength=1", "are not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"strengt": 1}', "unknown fusion settings: strengt"),
    ):
        with pytest.raises(ConfigError, match=message):
            Source(**names, settings=settings).load()


@pytest.mark.parametrize("name", ["sglang", "tensorrt_llm"])
def test_the_missing_engine_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, ENGINES + name, raising=False)
    with pytest.raises(MissingExtraError, match=name):
        importlib.import_module(ENGINES + name)
