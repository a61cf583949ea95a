"""Every family of docs/families.md, as target and as calibrator, equals the plain definition."""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor
from fusion_detox.decoding.build_decoder import check_calibrator
from fusion_detox.decoding.session import CalibratorSession
from fusion_detox.errors import ModelError

HERE = Path(__file__).resolve().parent
MODELS = runpy.run_path(str(HERE / "family_models.py"))
FAMILIES: dict[str, Any] = MODELS["FAMILIES"]
tokenizer_in_kind = MODELS["tokenizer_in_kind"]
SHARED = HERE.parents[1] / "shared" / "tokenizers"

CONFIG = FusionConfig(strength=2.0, plausibility=0.0, threshold=0.05)
PROMPTS = ["What a damn stupid thing to say! Shut", "The weather"]
STEPS = 5
CONTEXT = 32
OLD = transformers.__version__.startswith("4.")
# transformers 4 gives their layers other names, so only a trial run finds them.
OTHERWISE = ("Falcon-H1", "RecurrentGemma", "Jamba", "Bamba")
SERVE = [name for name, family in FAMILIES.items() if family.refused is None]
REFUSED = [name for name, family in FAMILIES.items() if family.refused is not None]
WINDOWED = [name for name in REFUSED if "less than twice" in FAMILIES[name].refused]


@pytest.fixture(autouse=True)
def maps(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path_factory.getbasetemp() / "maps"))


def get(name: str) -> tuple[Any, Any]:
    """Return a family and its tokenizer."""
    family = FAMILIES[name]
    if not hasattr(transformers, family.model):
        pytest.skip(f"transformers {transformers.__version__} has no {family.model}")
    return family, tokenizer_in_kind(family.tokenizer)


@functools.cache
def small_calibrator() -> Calibrator:
    return calibrator_of("Llama 3", tokenizer=tokenizer_in_kind("gpt2"))


def calibrator_of(
    name: str, tokenizer: Any = None, context: int = CONTEXT, **settings: Any
) -> Calibrator:
    family, own = get(name)
    tokenizer = own if tokenizer is None else tokenizer
    clean, reference = (family.make(len(tokenizer), tokenizer, s, **settings) for s in (1, 2))
    return Calibrator(clean, reference, tokenizer, context_length=context)


def pad_of(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if found is None else found)


def fresh(
    tokenizer: Any, calibrator: Calibrator | None = None, config: FusionConfig = CONFIG
) -> FusionLogitsProcessor:
    calibrator = small_calibrator() if calibrator is None else calibrator
    pad = pad_of(tokenizer)
    return FusionLogitsProcessor(calibrator, tokenizer, config, pad_token_id=pad)


class Recorder:
    """A processor that records its inputs and outputs."""

    def __init__(self, processor: FusionLogitsProcessor) -> None:
        self.processor = processor
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fused = self.processor(input_ids, scores)
        self.seen.append((input_ids, scores, fused))
        return fused

    @property
    def moved(self) -> float:
        """The largest change of a log-prob, to check that fusion did anything."""
        pairs = [(torch.log_softmax(s.float(), -1), f.float()) for _, s, f in self.seen]
        return max(float((f - s).abs().nan_to_num(0.0).max()) for s, f in pairs)


def batch_of(family: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Pad on the left, or on the right for encoders, which count positions from the left."""
    rows = [tokenizer(text)["input_ids"] for text in PROMPTS]
    if not family.padding:
        rows = [row[: min(map(len, rows))] for row in rows]
    longest, pad = max(map(len, rows)), pad_of(tokenizer)
    ids, mask = [], []
    for row in rows:
        filler, hidden, shown = (
            [pad] * (longest - len(row)),
            [0] * (longest - len(row)),
            [1] * len(row),
        )
        ids.append([*row, *filler] if family.encoder_decoder else [*filler, *row])
        mask.append([*shown, *hidden] if family.encoder_decoder else [*hidden, *shown])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def greedy(scores: torch.Tensor) -> torch.Tensor:
    return scores.argmax(-1)


def draw(scores: torch.Tensor) -> torch.Tensor:
    """Temperature 0.8, then top-k 20, then top-p 0.9."""
    scores = scores / 0.8
    scores = scores.masked_fill(scores < scores.topk(20).values[:, -1:], -torch.inf)
    probs = scores.softmax(-1)
    better = [[float(row[row > p].sum()) for p in row] for row in probs]
    scores = scores.masked_fill(torch.tensor(better) >= 0.9, -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def by_definition(
    model: Any, inputs: dict[str, torch.Tensor], tokenizer: Any, choose: Any, config: Any = CONFIG
) -> torch.Tensor:
    """Generate without cache, batch or padding, with a new processor for each row and step."""
    sources = [
        ids[mask.bool()][None]
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    encoded = model.config.is_encoder_decoder
    start = torch.tensor([[model.config.decoder_start_token_id]]) if encoded else None
    rows = [start if encoded else source for source in sources]
    torch.manual_seed(3)
    for _ in range(STEPS):
        steps = []
        for row, source in zip(rows, sources, strict=True):
            arguments = {"input_ids": row}
            if encoded:
                arguments = {"input_ids": source, "decoder_input_ids": row}
            with torch.no_grad():
                scores = model(**arguments, use_cache=False).logits[:, -1].float()
            steps.append(fresh(tokenizer, config=config)(row, scores))
        new = choose(torch.cat(steps))
        rows = [torch.cat([row, token.view(1, 1)], 1) for row, token in zip(rows, new, strict=True)]
    return torch.cat([row[:, -STEPS:] for row in rows])


def generate(
    model: Any, inputs: dict[str, torch.Tensor], processors: list[Any], sample: bool = False
) -> torch.Tensor:
    how: dict[str, Any] = {"do_sample": False}
    if sample:
        how = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(3)
    found = model.generate(**inputs, **how, max_new_tokens=STEPS, logits_processor=processors)
    return found[:, -STEPS:]


def target_of(name: str, **settings: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Return a model that does not stop, its tokenizer, and the prompts."""
    family, tokenizer = get(name)
    model = family.make(len(tokenizer) + family.columns, tokenizer, 5, **settings)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = pad_of(tokenizer)
    model.generation_config.use_cache = family.cached
    return model, tokenizer, batch_of(family, tokenizer)


def weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# As targets


@pytest.mark.parametrize("name", FAMILIES)
def test_target_equals_the_definition(name: str) -> None:
    """Greedy and sampled: a padded batch with a cache equals single rows without one."""
    if OLD and name == "Llama 4 (text)":
        pytest.skip("transformers 4 gives different logits with its cache than without")
    model, tokenizer, inputs = target_of(name)
    before = weights_hash(model)
    watch = Recorder(fresh(tokenizer))
    wanted = {
        sample: by_definition(model, inputs, tokenizer, draw if sample else greedy)
        for sample in (False, True)
    }
    for sample in (False, True, False):  # one instance, which must keep no state
        assert torch.equal(generate(model, inputs, [watch], sample), wanted[sample])
    width = watch.seen[0][1].shape[-1]
    assert width == len(tokenizer) + FAMILIES[name].columns
    assert watch.moved > 0.1
    # Surplus columns of the head keep their probability, whatever the model writes there.
    _, scores, fused = watch.seen[0]
    size = len(tokenizer)
    torch.testing.assert_close(fused[:, size:], torch.log_softmax(scores, -1)[:, size:])
    assert weights_hash(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_target_at_strength_zero_returns_the_same_scores(name: str) -> None:
    model, tokenizer, inputs = target_of(name)
    watch = Recorder(fresh(tokenizer, config=CONFIG.replace(strength=0.0)))
    for sample in (False, True):
        fused = generate(model, inputs, [watch], sample)
        assert torch.equal(fused, generate(model, inputs, [], sample))
    assert len(watch.seen) == 2 * STEPS
    assert all(fused is scores for _, scores, fused in watch.seen)


def check_steps(watch: Recorder, tokenizer: Any, new: torch.Tensor) -> None:
    """Check that each step equals a new processor's result, and that the best token was taken.

    This is for models whose rounding differs with and without a cache.
    """
    assert len(watch.seen) == new.shape[1]
    for step, (ids, scores, fused) in enumerate(watch.seen):
        assert fused.dtype == scores.dtype
        assert torch.isfinite(fused[torch.isfinite(scores)]).all()
        again = torch.cat([fresh(tokenizer)(ids[i : i + 1], scores[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(fused, again, atol=1e-4, rtol=1e-4)
        assert torch.equal(fused.argmax(-1), new[:, step])
    assert watch.moved > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["GPT-2", "BLOOM", "Llama 3", "Mixtral", "Qwen3", "Gemma 2", "Mamba", "T5"]
)
def test_target_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model, tokenizer, inputs = target_of(name)
    model = model.to(dtype)
    watch = Recorder(fresh(tokenizer))
    check_steps(watch, tokenizer, generate(model, inputs, [watch]))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # Scores passed in half precision are returned in half precision.
    ids, scores, fused = watch.seen[0]
    half = watch.processor(ids, scores.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), fused.float(), atol=0.1, rtol=0.05)


def test_the_soft_cap_of_the_logits_holds_before_fusion() -> None:
    model, tokenizer, inputs = target_of("Gemma 2", final_logit_softcapping=2.0)
    watch = Recorder(fresh(tokenizer))
    generate(model, inputs, [watch])
    assert all(scores.abs().max() <= 2.0 for _, scores, _ in watch.seen)
    # Fusion may exceed the cap, which belongs to the target and not to the calibrator.
    spread = [fused.amax(-1) - fused.amin(-1) for _, _, fused in watch.seen]
    assert max(float(part.max()) for part in spread) > 4.0


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["T5", "BART"])
def test_the_source_of_an_encoder_decoder_can_be_passed(name: str, beams: int) -> None:
    """Scores are those after source and decoded text; ``generate`` does not pass the source."""
    model, tokenizer, inputs = target_of(name)
    sources = [f"{text}\n" for text in PROMPTS]
    processor = fresh(tokenizer)
    alone, watch = Recorder(processor), Recorder(processor.following(sources))
    for one in (alone, watch):
        how = {"do_sample": False, "num_beams": beams, "max_new_tokens": STEPS}
        model.generate(**inputs, **how, logits_processor=[one])
    changed = False
    for ids, scores, fused in watch.seen:
        for row in range(len(ids)):
            source = tokenizer(sources[row // beams], add_special_tokens=False)["input_ids"]
            decoded = [i for i in ids[row].tolist() if i not in tokenizer.all_special_ids]
            text = torch.tensor([[*source, *decoded]])
            if len(decoded) == ids.shape[1] - 1:  # the row was only the special start token
                wanted = fresh(tokenizer)(text, scores[row : row + 1])
                torch.testing.assert_close(fused[row : row + 1], wanted, atol=1e-4, rtol=1e-4)
                without = fresh(tokenizer)(ids[row : row + 1], scores[row : row + 1])
                changed |= not torch.allclose(without, wanted, atol=1e-2)
    assert changed
    assert processor is alone.processor
    assert torch.equal(alone.seen[0][2], processor(*alone.seen[0][:2]))


# With published vocabularies


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].real])
def test_target_with_a_published_tokenizer(name: str) -> None:
    family, _ = get(name)
    folder = SHARED / family.real
    if not folder.is_dir():
        pytest.skip(f"there is no published tokenizer in {folder}")
    tokenizer = published(folder)
    model = family.make(len(tokenizer) + family.columns, tokenizer, 5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = pad_of(tokenizer)
    inputs = batch_of(family, tokenizer)
    watch = Recorder(published_processor(folder))
    new = generate(model, inputs, [watch])
    assert watch.processor.vocabulary.coverage > 0.98
    assert len(watch.seen) == STEPS
    assert watch.moved > 0.1
    ids, scores, fused = watch.seen[-1]
    watch.processor.reset()
    rows = [watch.processor(ids[i : i + 1], scores[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(fused, torch.cat(rows), atol=1e-4, rtol=1e-4)
    assert torch.equal(fused.argmax(-1), new[:, -1])


@functools.cache
def published(folder: Path) -> Any:
    if OLD:
        pytest.skip("transformers 4 cannot read the tokenizer classes that version 5 wrote there")
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def published_processor(folder: Path) -> FusionLogitsProcessor:
    """One processor per tokenizer: mapping a large vocabulary takes a second."""
    return fresh(published(folder))


# As calibrators


@pytest.mark.parametrize("name", SERVE)
def test_calibrator_equals_its_models_without_a_cache(name: str) -> None:
    check_session(calibrator_of(name))


def check_session(calibrator: Calibrator) -> None:
    session = CalibratorSession(calibrator, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    size = calibrator.vocabulary_size
    texts = torch.randint(5, size, (3, calibrator.context_length - 1), generator=generator).tolist()
    first, second, third = (tuple(text) for text in texts)
    long, short = len(first) * 2 // 3, len(first) // 4
    branch = (*first[: short + 1], *third[:2])
    history = [
        [first[:long], second[:short], third[:1]],
        [first[: long + 1], second[: short + 1], third[:2]],  # one more token each
        [first[:short], second[:long], branch],  # rolled back, a jump ahead, a branch
        [first, second[:1], ()],  # up to the last position, and back to the beginning
        [(*first[:short], third[0]), second[: long + 1], branch[:-1]],
    ]
    for prefixes in history:
        found = session.log_probs(prefixes)
        for part, model in enumerate(calibrator.models.values()):
            for column, prefix in enumerate(prefixes):
                ids = torch.tensor([[calibrator.bos_id, *prefix]])
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False).logits[0, -1, :size]
                wanted = torch.log_softmax(logits.float(), -1)
                torch.testing.assert_close(found[part, column], wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in SERVE if n not in ("Llama 1 and 2", "Llama 3")])
def test_calibrator_under_generate_equals_the_definition(name: str) -> None:
    """The target is a GPT-2, if possible with another vocabulary than the calibrator's."""
    calibrator = calibrator_of(name)
    model, tokenizer, inputs = target_of("GPT-2")
    watch = Recorder(fresh(tokenizer, calibrator))
    generate(model, inputs, [watch])
    new = Recorder(fresh(tokenizer, calibrator))
    for index in (STEPS - 1, 1):  # neither in order nor in a batch
        ids, scores, fused = watch.seen[index]
        rows = [new(ids[i : i + 1], scores[i : i + 1]) for i in (1, 0)]
        torch.testing.assert_close(fused, torch.cat(rows[::-1]), atol=5e-4, rtol=1e-4)
    assert watch.moved > 0.1


@pytest.mark.parametrize("name", REFUSED)
def test_calibrator_is_refused_with_reason_and_remedy(name: str) -> None:
    family, _ = get(name)
    with pytest.raises(ModelError) as caught:
        CalibratorSession(calibrator_of(name), device=torch.device("cpu"))
    if OLD and name in OTHERWISE:
        return
    message = str(caught.value)
    assert re.search(family.refused, message), message
    if not family.encoder_decoder:
        assert family.model in message
    # If the config shows it, no model is run.
    if not family.encoder_decoder and "does not run" not in message:
        with pytest.raises(ModelError, match=re.escape(message)):
            check_calibrator(calibrator_of(name))
    remedies = ("context_length of at most 8", "use a full-attention model", "Give a causal")
    assert any(remedy in message for remedy in remedies), message


@pytest.mark.parametrize("name", WINDOWED)
def test_the_advice_for_a_refused_window_works(name: str) -> None:
    check_session(calibrator_of(name, context=8))


def test_local_layers_narrower_than_the_context_are_refused() -> None:
    calibrator = calibrator_of("GPT-Neo", window_size=16)
    with pytest.raises(ModelError, match=r"window_size of 16 .* context_length of at most 8"):
        check_calibrator(calibrator)
    check_calibrator(
        calibrator_of("GPT-Neo", window_size=16, attention_types=[[["global", "global"], 1]])
    )


@pytest.mark.parametrize("name", ["Mistral", "Mamba", "Jamba"])
def test_an_unsupported_calibrator_is_refused_when_the_processor_is_created(name: str) -> None:
    if OLD and name in OTHERWISE:
        pytest.skip("transformers 4 does not show it in the config; it is refused when it runs")
    calibrator = calibrator_of(name)
    refused = False
    try:
        fresh(tokenizer_in_kind("gpt2"), calibrator)
    except ModelError:
        refused = True
    assert refused


# Quantised targets, if a library for them is installed. All of these run on a CPU.


def bitsandbytes(bits: int) -> Any:
    return transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)


def quanto(bits: int) -> Any:
    return transformers.QuantoConfig(weights=f"int{bits}")


def torchao(bits: int) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

    whole = Int8WeightOnlyConfig()
    return transformers.TorchAoConfig(
        whole if bits == 8 else IntxWeightOnlyConfig(weight_dtype=torch.int4)
    )


QUANTISERS = {"bitsandbytes": bitsandbytes, "optimum.quanto": quanto, "torchao": torchao}


@pytest.mark.filterwarnings("ignore")  # their own, on import
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("package", QUANTISERS)
def test_quantised_target(package: str, bits: int, tmp_path: Path) -> None:
    for needed in ("accelerate", package):
        try:
            importlib.import_module(needed)
        except ImportError:
            pytest.skip(f"{needed} is not installed")
    family, tokenizer = get("Llama 3")
    sizes = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 weights share a scale
    whole = family.make(len(tokenizer) + 3, tokenizer, 5, **sizes)
    whole.generation_config.eos_token_id = None
    whole.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QUANTISERS[package](bits), device_map="cpu"
    ).eval()
    inputs = batch_of(family, tokenizer)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(**inputs).logits
        return found

    before = logits()
    with torch.no_grad():
        assert not torch.equal(before, whole(**inputs).logits)  # it really is quantised
    watch = Recorder(fresh(tokenizer))
    check_steps(watch, tokenizer, generate(model, inputs, [watch]))
    assert torch.equal(logits(), before)


# Where the weights are


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, tokenizer = get("Llama 3")
    folder = tmp_path_factory.mktemp("llama")
    model = family.make(len(tokenizer) + 3, tokenizer, 5)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


# transformers 4.57 uses the first parameter's device as the model's.
@pytest.mark.filterwarnings("ignore:You are calling .generate")
@pytest.mark.parametrize("elsewhere", ["lm_head", "model.layers.1", "model.embed_tokens"])
def test_weights_offloaded_to_disk(elsewhere: str, saved_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    whole, tokenizer, inputs = target_of("Llama 3")
    parts = ["lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb"]
    places = dict.fromkeys([*parts, "model.layers.0", "model.layers.1"], "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved_llama, device_map={**places, elsewhere: "disk"}, offload_folder=tmp_path
    )
    assert "meta" in {parameter.device.type for parameter in model.parameters()}
    watch = Recorder(fresh(tokenizer))
    new = generate(model, inputs, [watch])
    assert torch.equal(new, by_definition(whole, inputs, tokenizer, greedy))
    assert watch.moved > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU as well as a CPU")
@pytest.mark.parametrize("body", [0, "cpu"])
def test_a_head_on_another_device(body: Any, saved_llama: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    whole, tokenizer, inputs = target_of("Llama 3")
    places = {"model": body, "lm_head": "cpu" if body == 0 else 0}
    model = transformers.AutoModelForCausalLM.from_pretrained(saved_llama, device_map=places)
    wanted = by_definition(whole, inputs, tokenizer, greedy)
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    watch = Recorder(fresh(tokenizer))
    new = generate(model, inputs, [watch])
    assert torch.equal(new.cpu(), wanted)
    assert all(fused.device == scores.device for _, scores, fused in watch.seen)


def test_the_calibrator_and_the_scores_may_be_on_different_devices() -> None:
    """As far as one machine allows: the result is on the device of the scores in every case."""
    _, tokenizer, _ = target_of("Llama 3")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    scores = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    wanted = fresh(tokenizer)(ids, scores)
    for place in devices:
        for device in devices:
            processor = FusionLogitsProcessor(small_calibrator(), tokenizer, CONFIG, device=place)
            fused = processor(ids.to(device), scores.to(device))
            assert fused.device.type == device
            torch.testing.assert_close(fused.cpu(), wanted, atol=1e-3, rtol=1e-3)


# The table in the docs


def test_the_docs_list_these_families() -> None:
    text = (HERE.parent / "docs" / "families.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (?!family|---)([^|]+?) \| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", text, re.M
    )
    table = {name: (target, calibrator, notes) for name, target, calibrator, notes in rows}
    assert list(table) == list(FAMILIES)
    for name, (target, calibrator, notes) in table.items():
        family = FAMILIES[name]
        assert target == "yes", name
        if family.refused is None:
            assert calibrator == "yes", name
        elif name in WINDOWED:
            assert calibrator == "within its window", name
        else:
            assert calibrator == "no", name
        assert f"`{family.model}`" in notes, name
        if family.encoder_decoder:
            assert "following" in notes, name
