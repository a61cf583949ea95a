"""Continuous batching: the adapter equals the definition, and unsupported paths are noticed."""

import pytest
import torch
from transformers import GenerationConfig

from fusion_detox import FusionLogitsProcessor
from fusion_detox.errors import ConfigError

from .conftest import CONFIG, TEXTS
from .modes import modes_of

integration = pytest.importorskip(
    "fusion_detox.integrations.continuous_batching",
)
transformers = pytest.importorskip("transformers", minversion="5.20")
ContinuousBatchingConfig = transformers.ContinuousBatchingConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*device_mesh:UserWarning")
MORE = [*TEXTS, "Thank you so much", "In 1987 the town built"]


def config(case, **changes):
    values = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": case.pad, **changes}
    return GenerationConfig(eos_token_id=case.eos, **values)


def plain(**changes):
    values = {"num_blocks": 64, "max_batch_tokens": 64, "page_size": 8}
    return ContinuousBatchingConfig(
        use_async_batching=False, use_cuda_graph=False, **{**values, **changes}
    )


def prompts(case, texts=MORE):
    return [case.encode([text])["input_ids"][0].tolist() for text in texts]


def by_definition(case, ids, steps=5, **options):
    rows = case.search([ids], max_new_tokens=steps, **options).sample()[0]
    return rows[0][len(ids) :]


@pytest.mark.parametrize("mode", modes_of("test_continuous_batching_equals_greedy"))
@pytest.mark.serves("transformers", "batches")
@pytest.mark.serves("transformers", "run on the engine")
def test_continuous_batching_equals_greedy(case, mode):
    """Four requests in batches of two, so one joins while another is in progress."""
    found = integration.generate_batch(
        case.model,
        prompts(case),
        case.processor,
        generation_config=config(case),
        continuous_batching_config=plain(max_requests_per_batch=2),
    )
    written = [output.generated_tokens for output in found.values()]
    assert written == [by_definition(case, ids) for ids in prompts(case)]


def test_manager_with_a_strength_per_request_and_warpers_after_fusion(one):
    """Top-k 1 after fusion gives fused greedy search; before fusion, it would give the target's."""
    manager = one.model.init_continuous_batching(
        generation_config=config(one, do_sample=True, temperature=0.7, top_k=1),
        continuous_batching_config=plain(),
    )
    integration.attach(manager, one.processor)
    with pytest.raises(ConfigError, match="already has a fusion processor"):
        integration.attach(manager, one.processor)
    ids = prompts(one)[1]
    manager.start()
    try:
        names = [manager.add_request(ids), manager.add_request(ids, strength=0.0)]
        found = {}
        while len(found) < 2:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert result.error is None
                found[result.request_id] = result.generated_tokens
    finally:
        manager.stop(block=True)
    assert found[names[0]] == by_definition(one, ids)
    assert found[names[1]] == by_definition(one, ids, fused=lambda row, scores: scores)
    assert found[names[0]] != found[names[1]]


@pytest.mark.serves("transformers", "strength per request")
def test_a_strength_per_prompt(one):
    ids, strengths = prompts(one), [0.0, None, 0.5, 0.0]
    found = integration.generate_batch(
        one.model,
        ids,
        one.processor,
        generation_config=config(one),
        continuous_batching_config=plain(),
        strengths=strengths,
    )
    expected = []
    for row, strength in zip(ids, strengths, strict=True):
        if strength == 0:
            fused = {"fused": lambda row, scores: scores}
        elif strength is None:
            fused = {}
        else:
            fused = {"fused": one.definition_of(CONFIG.replace(strength=strength))}
        expected.append(by_definition(one, row, **fused))
    assert [output.generated_tokens for output in found.values()] == expected
    for wrong, message in (([1.0], "1 strengths were given for 4 prompts"), ([-1.0] * 4, "-1.0")):
        with pytest.raises(ConfigError, match=message):
            integration.generate_batch(one.model, ids, one.processor, strengths=wrong)


@pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning")
def test_preemption_counts_no_token_twice(one):
    """The cache is too small for all requests, so the manager preempts and restarts some.

    A restarted request gets what it has generated as part of its prompt. If that counted twice,
    the calibrator would read another text than the definition does.
    """
    ids, steps = prompts(one)[1:], 16
    manager = one.model.init_continuous_batching(
        generation_config=config(one, max_new_tokens=steps),
        continuous_batching_config=plain(num_blocks=8, max_batch_tokens=32),
    )
    integration.attach(manager, one.processor)
    restarted, read = set(), {}
    adapter = next(p for p in manager.logit_processor.logits_processor if hasattr(p, "fuses"))
    prepare = adapter.prepare_tensor_args

    def watched(requests):
        result = prepare(requests)
        for request, text in zip(requests, adapter._texts, strict=True):
            state = request.state
            if len(state.initial_tokens) > len(ids[int(state.request_id)]):
                restarted.add(state.request_id)
            read.setdefault(state.request_id, []).append(text)
        return result

    adapter.prepare_tensor_args = watched
    manager.start()
    found = {}
    try:
        for name, row in enumerate(ids):
            manager.add_request(row, request_id=str(name))
        while len(found) < len(ids):
            result = manager.get_result(timeout=1)
            assert result is not None
            if result.is_finished():
                assert result.error is None
                found[int(result.request_id)] = result.generated_tokens
    finally:
        manager.stop(block=True)
    assert restarted, "no request was preempted, so this test shows nothing"
    for name, row in enumerate(ids):
        assert found[name] == by_definition(one, row, steps)
        texts = read[str(name)]
        assert texts == [row + found[name][:count] for count in range(len(texts))]


@pytest.mark.parametrize(
    "bad",
    [
        {"strength": -1.0},
        {"strength": float("nan")},
        {"strength": "strong"},
        {"strength": True},
        {"strengt": 1.0},
    ],
    ids=str,
)
@pytest.mark.serves("transformers", "bad request fails alone")
def test_a_bad_request_fails_alone(one, bad):
    """It fails with the reason while another request runs, and the manager goes on."""
    ids = prompts(one)[1]
    manager = one.model.init_continuous_batching(
        generation_config=config(one), continuous_batching_config=plain()
    )
    integration.attach(manager, one.processor)
    manager.start()
    found = {}
    try:
        manager.add_request(ids, request_id="good")
        manager.add_request(ids, request_id="bad", **bad)
        manager.add_request(ids, request_id="whole", strength=1)
        while len(found) < 3:
            result = manager.get_result(timeout=1)
            assert result is not None
            if result.is_finished():
                found[result.request_id] = result
        assert manager.is_running()
    finally:
        manager.stop(block=True)
    assert next(iter(bad)) in found["bad"].error
    assert found["bad"].generated_tokens == []
    assert found["good"].generated_tokens == by_definition(one, ids)
    whole = one.definition_of(CONFIG.replace(strength=1))
    assert found["whole"].generated_tokens == by_definition(one, ids, fused=whole)


def test_generate_batch_of_the_model_takes_no_processor(one):
    """If a transformers version starts to pass processors on, this test fails."""
    ids = prompts(one)[1]
    found = one.model.generate_batch(
        [ids],
        generation_config=config(one),
        continuous_batching_config=plain(),
        logits_processor=[one.processor],
    )
    (output,) = found.values()
    assert output.generated_tokens == by_definition(one, ids, fused=lambda row, scores: scores)


def test_paged_generation_drops_the_processor(one):
    """transformers does so silently. If this test fails, it has stopped: update the docs."""
    found = one.generate(
        input_ids=torch.tensor(prompts(one)[1:2]),
        cache_implementation="paged",
        processor=FusionLogitsProcessor(one.calibrator, one.tokenizer, CONFIG),
        continuous_batching_config=plain(),
    )
    unfused = by_definition(one, prompts(one)[1], fused=lambda row, scores: scores)
    assert found[0, 0, -5:].tolist() == unfused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_async_batching": True}, "use_async_batching=False"),
        ({"use_cuda_graph": True}, "use_cuda_graph=False"),
    ],
)
def test_settings_that_leave_no_place_for_fusion_are_refused(one, changes, message):
    class Manager:
        logit_processor = None
        batch_processor = None
        continuous_batching_config = ContinuousBatchingConfig(**changes)

        def is_running(self):
            return False

    with pytest.raises(ConfigError, match=message):
        integration.attach(Manager(), one.processor)


def test_wrong_use_of_attach(one):
    with pytest.raises(ConfigError, match="LlamaForCausalLM is not a continuous-batching manager"):
        integration.attach(one.model, one.processor)
    manager = one.model.init_continuous_batching(
        generation_config=config(one), continuous_batching_config=plain()
    )
    with pytest.raises(
        ConfigError, match="given 2 texts, but continuous batching has no fixed order"
    ):
        integration.attach(manager, one.processor.following(["a", "b"]))
    integration.attach(manager, one.processor.following("a"))
    manager.warmup()
    with pytest.raises(ConfigError, match="was already started or warmed up"):
        integration.attach(manager, one.processor)
    assert integration.generate_batch(one.model, [], one.processor) == {}
