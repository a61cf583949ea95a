"""Fusion in vLLM equals fusion of each request alone, whatever its batches do."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import Calibrator, FusionLogitsProcessor
from fusion_detox.errors import ConfigError, DataFileError, MissingExtraError, VocabularyError

from . import fake_vllm
from .fake_vllm import EngineV1, EngineV2, Request, params

MODULES = ("vllm", "vllm_v2", "vllm_step", "server_settings")
STRENGTHS = (0, 2.5, 1, None, 0.5)
PROMPTS = ("You are such a", "The weather was", "Thank you so much for", "In 1987 the", "He said")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path_factory, calibrator_folder, tmp_path):
    """The interfaces of vLLM, and a server with two calibrators."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(base / "maps"))
    for name in ("CALIBRATOR", "SETTINGS", "DEVICE"):
        monkeypatch.delenv(f"FUSION_DETOX_{name}", raising=False)
    fake_vllm.install(monkeypatch)
    for name in MODULES[:2]:
        monkeypatch.delitem(sys.modules, f"fusion_detox.integrations.{name}", raising=False)
    other = Calibrator.from_pretrained(str(calibrator_folder))
    Calibrator(other.reference, other.clean, other.tokenizer, context_length=32).save_pretrained(
        tmp_path / "swapped"
    )
    path = tmp_path / "server.json"
    calibrators = {"tiny": str(calibrator_folder), "swapped": str(tmp_path / "swapped")}
    path.write_text(json.dumps({"calibrators": calibrators, "max_strength": 4}), encoding="utf-8")
    monkeypatch.setenv("FUSION_DETOX_CONFIG", str(path))
    return calibrators


@pytest.fixture
def adapter():
    return importlib.import_module("fusion_detox.integrations.vllm")


@pytest.fixture(scope="module")
def tokenizer(target_folder):
    return AutoTokenizer.from_pretrained(target_folder)


@pytest.fixture(scope="module")
def target(target_folder):
    model = AutoModelForCausalLM.from_pretrained(target_folder).eval()

    @torch.no_grad()
    def logits(ids):
        return model(torch.tensor([ids])).logits[:, -1].float()

    return logits


@pytest.fixture
def config(target_folder, tokenizer):
    return fake_vllm.config(target_folder, len(tokenizer))


@pytest.fixture
def requests(tokenizer):
    """Twelve requests with five strengths and two calibrators."""
    found = []
    for place in range(12):
        asked = {"fusion_strength": STRENGTHS[place % 5], "another_processor": 1}
        asked = {name: value for name, value in asked.items() if value is not None}
        if place % 3 == 0:
            asked["fusion_calibrator"] = "swapped"
        ids = tokenizer(PROMPTS[place % 4])["input_ids"]
        found.append(Request(params(extra_args=asked), ids, wanted=4 + place % 4))
    return found


def alone(request, environment, tokenizer, target, made={}):  # noqa: B006 - one per session
    """What fusion in a loop of its own writes for a request."""
    name = request.params.extra_args.get("fusion_calibrator", "tiny")
    key = environment[name]
    if key not in made:
        made[key] = FusionLogitsProcessor(Calibrator.from_pretrained(key), tokenizer)
    strength = request.params.extra_args.get("fusion_strength", made[key].config.strength)
    processor = made[key].with_settings(strength=strength)
    ids = list(request.prompt)
    for _ in range(request.wanted):
        ids.append(int(processor(torch.tensor([ids]), target(ids)).argmax()))
    return ids[len(request.prompt) :]


@pytest.mark.serves("vLLM", "strength per request")
@pytest.mark.serves("vLLM", "batches")
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_v1_equals_each_request_alone(
    seed, asynchronous, adapter, config, requests, environment, tokenizer, target
):
    """Rows are filled, condensed, swapped and preempted; one mistake mixes up two requests."""
    processor = adapter.FusionVLLM(config, torch.device("cpu"), False)
    assert type(processor) is adapter.FusionV1
    assert not processor.is_argmax_invariant()
    engine = EngineV1(processor, target, seed, asynchronous=asynchronous)
    engine.run(requests)
    expected = [alone(each, environment, tokenizer, target) for each in requests]
    assert [each.output for each in requests] == expected
    assert engine.moves > 3
    assert engine.preempted > 0
    plain = [
        Request(params(extra_args={"fusion_strength": 0}), e.prompt, e.wanted) for e in requests
    ]
    unfused = [alone(each, environment, tokenizer, target) for each in plain]
    assert sum(a != b for a, b in zip(expected, unfused, strict=True)) > 4, "fusion changes nothing"


@pytest.mark.serves("vLLM", "drafts")
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("seed", range(2))
def test_v2_equals_each_request_alone(
    seed, drafts, adapter, config, requests, environment, tokenizer, target
):
    """Slots are recycled, and with drafts a request has several rows, most of them refused."""
    engine = EngineV2(
        lambda states: adapter.FusionVLLM(config, states), target, len(tokenizer), seed
    )
    assert type(engine.processor).__name__ == "FusionV2"
    engine.run(requests, drafts)
    expected = [alone(each, environment, tokenizer, target) for each in requests]
    assert [each.output for each in requests] == expected
    assert bool(engine.accepted) == bool(drafts)
    assert engine.drafted >= 2 * engine.accepted, "few drafts are refused"


def test_a_placeholder_is_never_fused_as_text(adapter, config, tokenizer, target, caplog):
    """A row with an unknown token may only end; the other rows are what they are without it."""
    ids = tokenizer(PROMPTS[0])["input_ids"]
    fused = params(extra_args={"fusion_strength": 2})
    off = params(extra_args={"fusion_strength": 0})
    outputs = [[7], [7, -1], [-1]]
    rows = [(0, fused, ids, outputs[0]), (1, fused, ids, outputs[1]), (2, off, ids, outputs[2])]
    logits = target([*ids, 7]).repeat(3, 1)
    processor = adapter.FusionV1(config, torch.device("cpu"), False)
    processor.update_state(fake_vllm.BatchUpdate(1, [], rows[:1], []))
    expected = processor.apply(logits[:1].clone())
    processor.update_state(fake_vllm.BatchUpdate(3, [], rows[1:], []))
    result = processor.apply(logits.clone())
    assert torch.equal(result[0], expected[0])
    assert result[1].isfinite().nonzero().flatten().tolist() == [tokenizer.eos_token_id]
    assert torch.equal(result[2], logits[2])
    assert "--no-async-scheduling" in caplog.text


def test_v2_notices_a_text_that_lags_behind(adapter, config, tokenizer, target):
    ids = tokenizer(PROMPTS[0])["input_ids"]
    engine = EngineV2(
        lambda states: adapter.FusionVLLM(config, states), target, len(tokenizer), seed=0
    )
    engine.processor.add_request(0, params())
    engine.ids[0, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    one = torch.tensor([0])
    context = fake_vllm.LogitsContext(
        one, one, one.numpy(), one, torch.tensor([ids[-1] + 1]), one + len(ids) - 1, None
    )
    result = engine.processor.apply(target(ids), context)
    assert result[0].isfinite().nonzero().flatten().tolist() == [tokenizer.eos_token_id]


def test_nothing_is_read_where_no_row_is_fused(adapter, config, tokenizer, target):
    logits = target(tokenizer(PROMPTS[0])["input_ids"])
    before = logits.clone()
    processor = adapter.FusionV1(config, torch.device("cpu"), False)
    off = params(extra_args={"fusion_strength": 0})
    processor.update_state(fake_vllm.BatchUpdate(1, [], [(0, off, [5], [])], []))
    assert processor.apply(logits) is logits
    assert torch.equal(logits, before)


def test_masked_tokens_stay_masked(adapter, config, tokenizer, target):
    """A grammar's mask must survive, in whatever the fused row holds."""
    ids = tokenizer(PROMPTS[0])["input_ids"]
    logits = target(ids)
    logits[:, ::2] = -torch.inf
    processor = adapter.FusionV1(config, torch.device("cpu"), False)
    processor.update_state(fake_vllm.BatchUpdate(1, [], [(0, params(), ids, [])], []))
    result = processor.apply(logits.clone())
    assert torch.equal(result.isneginf(), logits.isneginf())
    assert not torch.equal(result, logits)


@pytest.mark.serves("vLLM", "bad request fails alone")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fusion_strength": float("nan")}, "fusion_strength must be a number .*nan"),
        ({"fusion_strength": float("inf")}, "fusion_strength must be a number .*inf"),
        ({"fusion_strength": -1}, "fusion_strength must be a number of at least 0"),
        ({"fusion_strength": 1e300}, "fusion_strength is 1e\\+300"),
        ({"fusion_strength": 5}, "above 4, the largest that this server allows"),
        ({"fusion_strength": "much"}, "must be a number, but is 'much'"),
        ({"fusion_strength": [1.0]}, "must be a number"),
        ({"fusion_calibrator": "absent"}, "'absent', which this server does not have: use tiny or"),
        ({"fusion_calibrator": "/etc"}, "'/etc', which this server does not have"),
        ({"fusion_calibrator": ["tiny"]}, "which this server does not have"),
        ({"fusion_calibrator": "x" * 9999}, "^fusion_calibrator is 'x{56}\\.\\.\\.,"),
        ({"strength": 1}, "unknown argument 'strength': use fusion_strength or"),
        ({"fusion_strenght": 1}, "unknown argument 'fusion_strenght'"),
    ],
)
def test_a_bad_request_is_refused_with_a_reason(asked, message, adapter):
    with pytest.raises(ConfigError, match=message):
        adapter.FusionVLLM.validate_params(params(extra_args=asked))


def test_a_client_cannot_name_a_path(adapter, calibrator_folder):
    with pytest.raises(ConfigError, match="does not have"):
        adapter.FusionVLLM.validate_params(
            params(extra_args={"fusion_calibrator": str(calibrator_folder)})
        )


@pytest.mark.serves("vLLM", "beams", "refused")
def test_a_step_of_a_beam_search_is_refused(adapter):
    step = {"max_tokens": 1, "logprobs": 4, "detokenize": False}
    with pytest.raises(ConfigError, match="beam search ignores logits processors"):
        adapter.FusionVLLM.validate_params(params(**step))
    adapter.FusionVLLM.validate_params(params(**step, extra_args={"fusion_strength": 0}))
    adapter.FusionVLLM.validate_params(params(max_tokens=1, logprobs=4))


def test_a_request_that_the_front_end_let_through_ends(adapter, config, tokenizer, target, caplog):
    """Settings may differ between the machines of a server; the engine must go on."""
    ids = tokenizer(PROMPTS[0])["input_ids"]
    bad = params(extra_args={"fusion_calibrator": "absent"})
    processor = adapter.FusionV1(config, torch.device("cpu"), False)
    rows = [(0, bad, ids, []), (1, params(), ids, [])]
    processor.update_state(fake_vllm.BatchUpdate(2, [], rows, []))
    result = processor.apply(target(ids).repeat(2, 1))
    assert result[0].isfinite().nonzero().flatten().tolist() == [tokenizer.eos_token_id]
    assert result[1].isfinite().all()
    assert "'absent'" in caplog.text


def test_engines_that_cannot_be_fused_do_not_start(adapter, target_folder, tokenizer):
    device = torch.device("cpu")
    embeds = fake_vllm.config(target_folder, len(tokenizer), enable_prompt_embeds=True)
    with pytest.raises(ConfigError, match="--enable-prompt-embeds"):
        adapter.FusionVLLM(embeds, device, False)
    with pytest.raises(VocabularyError):
        adapter.FusionVLLM(fake_vllm.config(target_folder, 100_000), device, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"strength": 1}', "unknown: strength"),
        ('{"calibrators": {}}', "at least one entry"),
        ('{"calibrators": "tiny"}', "calibrators must be a JSON object"),
        ('{"settings": {"stength": 1}}', "unknown fusion settings: stength"),
        ('{"settings": {"strength": NaN}}', "NaN"),
        ('{"settings": {"strength": 3}, "max_strength": 2}', "above 2"),
        ('{"settings": {"strength": 0}, "min_strength": 1}', "below 1"),
        ('{"settings": {"rule": "aligned", "strength": 1}}', "target's output layer"),
        ('{"metrics_port": 0}', "metrics_port must be"),
    ],
)
def test_a_bad_settings_file_is_refused(content, message, monkeypatch, tmp_path, adapter):
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    monkeypatch.setenv("FUSION_DETOX_CONFIG", str(path))
    with pytest.raises(ConfigError, match=message):
        adapter.FusionVLLM.validate_params(params())


def test_settings_come_from_a_file_or_from_variables(monkeypatch, tmp_path, calibrator_folder):
    settings = importlib.import_module("fusion_detox.integrations.server_settings").ServerSettings
    monkeypatch.setenv("FUSION_DETOX_SETTINGS", '{"strength": 1.5}')
    with pytest.raises(ConfigError, match="FUSION_DETOX_CONFIG is set, and so is"):
        settings.from_environment()
    monkeypatch.delenv("FUSION_DETOX_CONFIG")
    monkeypatch.setenv("FUSION_DETOX_CALIBRATOR", str(calibrator_folder))
    assert settings.from_environment().of_request(None) == ("tiny", 1.5)
    monkeypatch.setenv("FUSION_DETOX_SETTINGS", "strength=1")
    with pytest.raises(ConfigError, match="FUSION_DETOX_SETTINGS is not JSON"):
        settings.from_environment()
    monkeypatch.delenv("FUSION_DETOX_SETTINGS")
    monkeypatch.setenv("FUSION_DETOX_CONFIG", str(tmp_path / "absent.json"))
    monkeypatch.delenv("FUSION_DETOX_CALIBRATOR")
    with pytest.raises(DataFileError, match=r"absent\.json, which cannot be read"):
        settings.from_environment()


def test_a_server_may_forbid_switching_fusion_off(monkeypatch, tmp_path, environment, adapter):
    path = tmp_path / "strict.json"
    path.write_text(json.dumps({"calibrators": environment, "min_strength": 0.5}))
    monkeypatch.setenv("FUSION_DETOX_CONFIG", str(path))
    with pytest.raises(ConfigError, match=r"strength 0 is below 0\.5"):
        adapter.FusionVLLM.validate_params(params(extra_args={"fusion_strength": 0}))


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in (fake_vllm.V1, fake_vllm.V2):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="vllm"):
        importlib.import_module("fusion_detox.integrations.vllm")
