"""The aligned rule equals fusion of hidden states, which a hook on the target performs."""

from __future__ import annotations

import codecs
import copy
import dataclasses
import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fusion_detox.alignment.alignment import Alignment, align
from fusion_detox.alignment.target_head import TargetHead
from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.config import FusionConfig
from fusion_detox.decoding.session import CalibratorSession
from fusion_detox.errors import AlignmentError, ConfigError, ModelError
from fusion_detox.fusion import kl_divergence
from fusion_detox.processor import FusionLogitsProcessor
from fusion_detox.vocabulary.token_table import TokenTable

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "family_models.py"))
# Families whose heads differ: with a bias, a scale, an effective soft cap, or tied weights.
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT-2", {}),
    "Llama": ("Llama 3", {}),
    "Llama, tied": ("Llama 3", {"tie_word_embeddings": True}),
    "GPT-NeoX": ("GPT-NeoX, Pythia", {}),
    "OPT": ("OPT", {}),
    "Phi, bias": ("Phi-1, Phi-2", {}),
    "GPT-J, bias": ("GPT-J", {}),
    "Cohere, scale": ("Cohere Command R", {"logit_scale": 0.25}),
    "Granite, divisor": ("Granite", {"logits_scaling": 4.0}),
    "Gemma 2, soft cap": ("Gemma 2", {"final_logit_softcapping": 4.0}),
    "Falcon-H1, multiplier": ("Falcon-H1", {"lm_head_multiplier": 0.5}),
}
PROMPTS = ["The weather was fine, so we", "You are a complete"]
ALPHA = 0.3
EXACT = FusionConfig(rule="aligned", strength=ALPHA, plausibility=0.0)


class Case:
    """A target with an alignment, and the definition of hidden-state fusion."""

    def __init__(self, target: PreTrainedModel, tokenizer: Any, calibrator: Calibrator) -> None:
        self.target, self.tokenizer, self.calibrator = target, tokenizer, calibrator
        self.alignment = align(calibrator, target, tokenizer, show_progress=False)

    def processor(self, config: FusionConfig = EXACT, **options: Any) -> FusionLogitsProcessor:
        return FusionLogitsProcessor(
            self.calibrator,
            self.tokenizer,
            config,
            target=self.target,
            alignment=self.alignment,
            **options,
        )

    def calibrator_vector(self, ids: list[int], part: str = "clean") -> torch.Tensor:
        """The last hidden state after a text that is tokenised as a whole, without a cache."""
        token_bytes = TokenTable.from_tokenizer(self.tokenizer).token_bytes
        known = [token_bytes[id] if id < len(token_bytes) else None for id in ids]
        data = b"".join(b"\n" if one is None else one for one in known)
        # An unfinished character at the end is left out.
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
        own = self.calibrator.tokenizer(text, add_special_tokens=False)["input_ids"]
        model = self.calibrator.models[part]
        seen: list[torch.Tensor] = []
        layer: Any = model.get_output_embeddings()
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([[self.calibrator.bos_id, *own]]), use_cache=False)
        handle.remove()
        return seen[0][0, -1]

    def hooked(self, ids: list[int], strength: float = ALPHA, gain: float = 1.0) -> torch.Tensor:
        """The target's logits with its last hidden state replaced by the fused one."""
        vector = F.layer_norm(
            self.calibrator_vector(ids) @ self.alignment.matrix, (self.alignment.matrix.shape[1],)
        )

        def replace(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (strength * gain * vector + (1 - strength) * inputs[0], *inputs[1:])

        layer: Any = self.target.get_output_embeddings()
        handle = layer.register_forward_pre_hook(replace)
        try:
            return self.logits(ids)
        finally:
            handle.remove()

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            output: Any = self.target(input_ids=torch.tensor([ids]), use_cache=False)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


@pytest.fixture(scope="module")
def shared(byte_tokenizer: PreTrainedTokenizerFast, make_llama: Any) -> Calibrator:
    width = len(byte_tokenizer)
    small = {"hidden_size": 24, "num_key_value_heads": 4, "max_position_embeddings": 128}
    models = [make_llama(width, seed=seed, **small) for seed in (1, 2)]
    return Calibrator(*models, byte_tokenizer, context_length=100, name="tiny")


@pytest.fixture(scope="module", params=TARGETS)
def case(request: pytest.FixtureRequest, shared: Calibrator) -> Case:
    name, settings = TARGETS[request.param]
    family = FAMILIES["FAMILIES"][name]
    tokenizer = FAMILIES["tokenizer_in_kind"](family.tokenizer)
    target = family.make(len(tokenizer) + family.columns, tokenizer, seed=3, **settings)
    layer: Any = target.get_output_embeddings()
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.normal_()
    return Case(target, tokenizer, shared)


@pytest.fixture(scope="module")
def gpt2(shared: Calibrator) -> Case:
    family = FAMILIES["FAMILIES"]["GPT-2"]
    tokenizer = FAMILIES["tokenizer_in_kind"](family.tokenizer)
    return Case(family.make(len(tokenizer), tokenizer, seed=3), tokenizer, shared)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal as distributions, to 1e-4 per token."""
    torch.testing.assert_close(
        found.log_softmax(-1), wanted.float().log_softmax(-1), atol=1e-4, rtol=1e-5
    )


def test_equals_fusion_of_hidden_states(case: Case) -> None:
    processor = case.processor()
    for prompt in PROMPTS:
        ids = case.ids(prompt)
        for end in range(max(1, len(ids) - 3), len(ids) + 1):
            scores = case.logits(ids[:end])[None]
            fused = processor(torch.tensor([ids[:end]]), scores)
            close(fused[0], case.hooked(ids[:end]))
            assert float(kl_divergence(fused, scores.log_softmax(-1))) > 1e-4


def test_greedy_generation_with_cache_equals_full_forward_passes(case: Case) -> None:
    ids = case.ids(PROMPTS[0])
    wanted = list(ids)
    for _ in range(8):
        wanted.append(int(case.hooked(wanted).argmax()))
        if wanted[-1] == case.target.config.eos_token_id:
            break
    model: Any = case.target
    found = model.generate(
        input_ids=torch.tensor([ids]),
        max_new_tokens=8,
        do_sample=False,
        logits_processor=[case.processor()],
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert found.sequences[0].tolist()[: len(wanted)] == wanted
    for step, scores in enumerate(found.scores[: len(wanted) - len(ids)]):
        close(scores[0], case.hooked(wanted[: len(ids) + step]))


def test_strength_one_and_strength_zero(case: Case) -> None:
    ids = case.ids(PROMPTS[0])
    scores = case.logits(ids)[None]
    whole = case.processor(EXACT.replace(strength=1.0))
    close(whole(torch.tensor([ids]), scores)[0], case.hooked(ids, strength=1.0))
    none = case.processor(EXACT.replace(strength=0.0))
    assert none(torch.tensor([ids]), scores) is scores


def test_log_probs_give_the_same_result_as_logits(case: Case) -> None:
    """Beam search passes log-probs; for a soft-capped head, logits are recovered from them."""
    ids = case.ids(PROMPTS[1])
    scores = case.logits(ids)[None]
    before = scores.clone()
    processor = case.processor()
    fused = processor(torch.tensor([ids]), scores.log_softmax(-1))
    close(fused[0], case.hooked(ids))
    close(fused[0], processor(torch.tensor([ids]), scores)[0])
    assert torch.equal(scores, before)


def test_beams_and_left_padding(case: Case) -> None:
    """Each step of a padded batch under beam search equals the hook."""
    pad = case.tokenizer.pad_token_id
    pad = case.tokenizer.eos_token_id if pad is None else pad
    rows = [case.ids(prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    processor = case.processor(pad_token_id=pad)
    checked = 0

    class Checked(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            nonlocal checked
            fused = processor(input_ids, scores)
            for row, result in zip(input_ids.tolist(), fused, strict=True):
                while row[0] == pad:
                    del row[0]
                if case.target.config.eos_token_id not in row and pad not in row:
                    close(result, case.hooked(row))
                    checked += 1
            return fused

    model: Any = case.target
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=2,
        do_sample=False,
        max_new_tokens=4,
        pad_token_id=pad,
        logits_processor=[Checked()],
    )
    assert checked >= 8


def test_forbidden_tokens_stay_forbidden(gpt2: Case) -> None:
    ids = gpt2.ids(PROMPTS[0])
    scores = gpt2.logits(ids)[None].repeat(2, 1)
    scores[0, 5:40] = -torch.inf
    scores[1, 7] = torch.nan
    fused = gpt2.processor()(torch.tensor([ids, ids]), scores)
    assert torch.isinf(fused[0, 5:40]).all()
    wanted = gpt2.hooked(ids).masked_fill(torch.isinf(scores[0]), -torch.inf)
    close(fused[0][torch.isfinite(fused[0])], wanted[torch.isfinite(wanted)])
    torch.testing.assert_close(fused[1], scores[1], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(gpt2: Case, dtype: torch.dtype) -> None:
    ids = gpt2.ids(PROMPTS[0])
    assert gpt2.processor()(torch.tensor([ids]), gpt2.logits(ids)[None].to(dtype)).dtype == dtype


def test_norm_of_the_target(gpt2: Case) -> None:
    """The vector is scaled to the norm of the target's hidden state, here that of another text."""
    ids = gpt2.ids(PROMPTS[0])
    gain = TargetHead(gpt2.target, gpt2.tokenizer).root_mean_square
    seen: list[torch.Tensor] = []
    layer: Any = gpt2.target.get_output_embeddings()
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    gpt2.logits(gpt2.ids(" ".join(PROMPTS)))
    handle.remove()
    assert gain == pytest.approx(float(seen[0].square().mean().sqrt()), rel=0.1)
    fused = gpt2.processor(EXACT.replace(aligned_norm="target"))(
        torch.tensor([ids]), gpt2.logits(ids)[None]
    )
    close(fused[0], gpt2.hooked(ids, gain=gain))


def test_an_unfinished_character_is_left_out(gpt2: Case) -> None:
    """The calibrator reads the bytes before the character until the character is complete."""
    whole = gpt2.ids("Zürich, naïve café 東京")
    processor = gpt2.processor()
    for end in range(2, len(whole) + 1):
        ids = whole[:end]
        close(processor(torch.tensor([ids]), gpt2.logits(ids)[None])[0], gpt2.hooked(ids))


def test_aligned_contrast_equals_its_definition(case: Case) -> None:
    config = FusionConfig(
        rule="aligned_contrast",
        strength=1.3,
        plausibility=0.0,
        clip=2.0,
        floor=0.0,
        aligned_norm="none",
    )
    ids = case.ids(PROMPTS[0])
    logits = case.logits(ids)
    head = TargetHead(case.target, case.tokenizer)
    log_probs = [
        head.apply_cap(
            head.uncapped_logits((case.calibrator_vector(ids, part) @ case.alignment.matrix)[None])
        ).log_softmax(-1)[0]
        for part in ("clean", "reference")
    ]
    token_bytes = TokenTable.from_tokenizer(case.tokenizer).token_bytes
    ratio = (log_probs[0] - log_probs[1]).clamp(-2.0, 2.0)
    spelled = [i < len(token_bytes) and token_bytes[i] is not None for i in range(len(logits))]
    has_bytes = torch.tensor(spelled)
    target = logits.log_softmax(-1)
    moved = target + torch.where(has_bytes, 1.3 * ratio, 0.0)
    # Tokens without bytes keep their probability; the others keep their total probability.
    mass = target[has_bytes].logsumexp(0) - moved[has_bytes].logsumexp(0)
    wanted = torch.where(has_bytes, moved + mass, target)
    fused = case.processor(config)(torch.tensor([ids]), logits[None])[0]
    torch.testing.assert_close(fused, wanted, atol=1e-4, rtol=1e-4)
    assert float(kl_divergence(fused, target)) > 1e-3


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5])
def test_kl_budget_is_respected_and_fully_used(case: Case, budget: float) -> None:
    ids = case.ids(PROMPTS[0])
    scores = case.logits(ids)[None]
    target = scores.log_softmax(-1)
    free = float(kl_divergence(case.processor()(torch.tensor([ids]), scores), target))
    processor = case.processor(EXACT.replace(kl_budget=budget))
    fused, strength = processor.with_strength(torch.tensor([ids]), scores)
    spent = float(kl_divergence(fused, target))
    assert spent <= budget * 1.001 + 1e-5
    assert spent == pytest.approx(min(budget, free), rel=0.02, abs=1e-4)
    close(fused[0], case.hooked(ids, strength=float(strength)))


def test_context_kl_scales_the_strength(case: Case) -> None:
    ids = case.ids(PROMPTS[0])
    scores = case.logits(ids)[None]
    processor = case.processor(EXACT.replace(context_kl=1e-6))
    fused, whole = processor.with_strength(torch.tensor([ids]), scores)
    close(fused[0], case.hooked(ids, strength=EXACT.strength))
    assert float(whole) == pytest.approx(EXACT.strength)
    context = case.processor()._context.read(tuple(ids)).path
    (recent,) = processor._session(scores.device).recent_divergence([context])
    fused, half = processor.with_settings(context_kl=2 * recent).with_strength(
        torch.tensor([ids]), scores
    )
    assert float(half) == pytest.approx(EXACT.strength / 2, rel=1e-5)
    close(fused[0], case.hooked(ids, strength=float(half)))


def test_settings_share_one_cache(gpt2: Case) -> None:
    ids = torch.tensor([gpt2.ids(PROMPTS[0])])
    scores = gpt2.logits(ids[0].tolist())[None]
    processor = gpt2.processor()
    other = processor.with_settings(rule="aligned_contrast", strength=1.0)
    plain = processor.with_settings(rule="contrast", strength=1.0)
    fresh = FusionLogitsProcessor(gpt2.calibrator, gpt2.tokenizer, plain.config)
    for _ in range(2):  # hidden states and log-probs of the same texts must not be mixed up
        close(processor(ids, scores)[0], gpt2.hooked(ids[0].tolist()))
        torch.testing.assert_close(plain(ids, scores), fresh(ids, scores))
        assert other(ids, scores).isfinite().all()


def test_copies_and_pickles_give_the_same_result(gpt2: Case) -> None:
    ids = torch.tensor([gpt2.ids(PROMPTS[0])])
    scores = gpt2.logits(ids[0].tolist())[None]
    processor = gpt2.processor()
    wanted = processor(ids, scores)
    for made in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        torch.testing.assert_close(made(ids, scores), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cached_hidden_states_equal_uncached_ones(
    kind: str, make_llama: Any, make_gpt2: Any, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Both decoders, for growing, branching and shortened texts, with log-probs in between."""
    make, width = (make_llama if kind == "llama" else make_gpt2), len(byte_tokenizer)
    calibrator = Calibrator(
        make(width, seed=1), make(width, seed=2), byte_tokenizer, context_length=24
    )
    with torch.no_grad():  # a scale of the final norm that is not 1
        for model in calibrator.models.values():
            norm = model.model.norm if kind == "llama" else model.transformer.ln_f
            norm.weight.uniform_(0.5, 2.0)
    session = CalibratorSession(calibrator, device=torch.device("cpu"), max_rows=3)
    rng = torch.Generator().manual_seed(0)
    text = tuple(torch.randint(1, width, (60,), generator=rng).tolist())
    asked = [text[:4], text[:5], text[:30], (*text[:5], 9), text[:3], text[:31], text, text[:4]]
    for step in range(len(asked)):
        prefixes = asked[step : step + 3]
        hidden, log_probs = session.hidden(prefixes), session.log_probs(prefixes)
        for column, prefix in enumerate(prefixes):
            start = next(
                s for s in range(0, 99, 12) if 1 + len(prefix) - s <= 24
            )  # strides of half a context
            window = torch.tensor([[calibrator.bos_id, *prefix[start:]]])
            for part, model in enumerate(calibrator.models.values()):
                with torch.no_grad():
                    state = model(input_ids=window, output_hidden_states=True).hidden_states[-1]
                    expected = model(input_ids=window).logits[0, -1].log_softmax(-1)
                torch.testing.assert_close(hidden[part, column], state[0, -1], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(log_probs[part, column], expected, atol=1e-4, rtol=1e-4)


def test_log_probs_of_a_capped_head_with_too_few_tokens_left(
    shared: Calibrator, caplog: pytest.LogCaptureFixture
) -> None:
    """The logits cannot be recovered, so the row is returned unfused, with one warning."""
    family = FAMILIES["FAMILIES"]["Gemma 2"]
    tokenizer = FAMILIES["tokenizer_in_kind"](family.tokenizer)
    target = family.make(len(tokenizer), tokenizer, seed=3, final_logit_softcapping=4.0)
    case = Case(target, tokenizer, shared)
    ids = case.ids(PROMPTS[0])
    scores = case.logits(ids)[None].log_softmax(-1)
    scores[:, 3:-40] = -torch.inf
    processor = case.processor()
    for _ in range(2):
        close(processor(torch.tensor([ids]), scores)[0][-40:], scores[0][-40:])
    assert [record.message[:19] for record in caplog.records] == ["1 rows of log-probs"]


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_a_capped_head_with_tokens_masked_by_a_finite_value(
    shared: Calibrator, value: float
) -> None:
    """Such a value is not a logit; treated as one, it would shift the whole row or produce NaN."""
    family = FAMILIES["FAMILIES"]["Gemma 2"]
    tokenizer = FAMILIES["tokenizer_in_kind"](family.tokenizer)
    target = family.make(len(tokenizer), tokenizer, seed=3, final_logit_softcapping=4.0)
    case = Case(target, tokenizer, shared)
    ids = case.ids(PROMPTS[0])
    scores = case.logits(ids)[None].log_softmax(-1)
    processor = case.processor()
    free = processor(torch.tensor([ids]), scores)[0]
    masked = scores.clone()
    masked[:, 7] = value
    found = processor(torch.tensor([ids]), masked)[0]
    others = torch.arange(len(free)) != 7
    assert bool(torch.isfinite(found[others]).all())
    close(found[others].log_softmax(-1), free[others].log_softmax(-1))


def test_a_capped_head_keeps_the_dtype(shared: Calibrator) -> None:
    family = FAMILIES["FAMILIES"]["Gemma 2"]
    tokenizer = FAMILIES["tokenizer_in_kind"](family.tokenizer)
    target = family.make(len(tokenizer), tokenizer, seed=3, final_logit_softcapping=4.0)
    case = Case(target, tokenizer, shared)
    ids = case.ids(PROMPTS[0])
    scores = case.logits(ids)[None].to(torch.bfloat16)
    assert case.processor()(torch.tensor([ids]), scores).dtype == torch.bfloat16


def test_wrong_use_raises_at_construction(gpt2: Case, byte_tokenizer: Any) -> None:
    calibrator, tokenizer = gpt2.calibrator, gpt2.tokenizer
    with pytest.raises(ConfigError, match=r"rule 'aligned' works on .*target=model"):
        FusionLogitsProcessor(calibrator, tokenizer, EXACT)
    plain = FusionLogitsProcessor(calibrator, tokenizer, FusionConfig())
    with pytest.raises(ConfigError, match=r"pass the model that generates"):
        plain.with_settings(rule="aligned", strength=0.1)
    with pytest.raises(
        AlignmentError, match=r"no alignment of .* was found: .*`fusion-detox align"
    ):
        FusionLogitsProcessor(calibrator, tokenizer, EXACT, target=gpt2.target)
    alone = Calibrator(calibrator.clean, None, byte_tokenizer, context_length=100)
    with pytest.raises(ConfigError, match="'aligned_contrast' needs a reference model"):
        FusionLogitsProcessor(
            alone,
            tokenizer,
            FusionConfig(rule="aligned_contrast"),
            target=gpt2.target,
            alignment=gpt2.alignment,
        )
    with pytest.raises(ConfigError, match=r"at most 1, but is 1.5 \(rule 'aligned'\)"):
        FusionConfig(rule="aligned", strength=1.5)
    with pytest.raises(ConfigError, match="aligned_norm must be one of auto, layer, target, none"):
        FusionConfig(aligned_norm="rms")  # type: ignore[arg-type]


def test_a_reference_of_another_width(shared: Calibrator, gpt2: Case, make_llama: Any) -> None:
    other = make_llama(len(shared.tokenizer), seed=5, hidden_size=16, max_position_embeddings=128)
    mixed = Calibrator(shared.clean, other, shared.tokenizer, context_length=100)
    options: dict[str, Any] = {"target": gpt2.target, "alignment": gpt2.alignment}
    ids = torch.tensor([gpt2.ids(PROMPTS[0])])
    aligned = FusionLogitsProcessor(mixed, gpt2.tokenizer, EXACT, **options)
    close(aligned(ids, gpt2.logits(ids[0].tolist())[None])[0], gpt2.hooked(ids[0].tolist()))
    with pytest.raises(ConfigError, match="the clean model's have width 24 and the reference's"):
        aligned.with_settings(rule="aligned_contrast")


def test_a_matrix_of_other_widths(gpt2: Case) -> None:
    wrong = dataclasses.replace(gpt2.alignment, matrix=gpt2.alignment.matrix[:, :-2])
    with pytest.raises(AlignmentError, match=r"width 24 to width 30, but .* have widths 24 and 32"):
        FusionLogitsProcessor(
            gpt2.calibrator, gpt2.tokenizer, EXACT, target=gpt2.target, alignment=wrong
        )


def test_an_alignment_of_other_models_raises(
    gpt2: Case, shared: Calibrator, make_llama: Any
) -> None:
    def use(calibrator: Calibrator, target: PreTrainedModel, alignment: Alignment) -> None:
        FusionLogitsProcessor(calibrator, gpt2.tokenizer, EXACT, target=target, alignment=alignment)

    family = FAMILIES["FAMILIES"]["GPT-2"]
    other = family.make(len(gpt2.tokenizer), gpt2.tokenizer, seed=4)
    with pytest.raises(AlignmentError, match="it is stale, or belongs to another model"):
        use(shared, other, gpt2.alignment)
    retrained = make_llama(len(shared.tokenizer), seed=9, hidden_size=24, num_key_value_heads=4)
    changed = Calibrator(retrained, None, shared.tokenizer, context_length=32)
    with pytest.raises(AlignmentError, match=r"does not match the output embeddings of .* stale"):
        use(changed, gpt2.target, gpt2.alignment)
    # The same weights in half precision are accepted.
    half = copy.deepcopy(gpt2.target).to(torch.bfloat16)  # type: ignore[arg-type]
    use(shared, half, gpt2.alignment)


def test_a_target_with_another_kind_of_head_raises(gpt2: Case) -> None:
    class Squared(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config, self.dtype = inner, inner.config, inner.dtype
            self.device = inner.device

        def get_output_embeddings(self) -> Any:
            return self.inner.get_output_embeddings()

        def forward(self, **arguments: Any) -> Any:
            output = self.inner(**arguments)
            output.logits = output.logits.square()
            return output

    strange: Any = Squared(gpt2.target)
    with pytest.raises(
        ModelError, match=r"the logits differ by up to .* use a rule that needs no hid"
    ):
        TargetHead(strange, gpt2.tokenizer)


def test_an_encoder_target_raises(gpt2: Case) -> None:
    encoder: Any = BertForMaskedLM(
        BertConfig(
            vocab_size=len(gpt2.tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.raises(ModelError, match=r"is an encoder \(bert\)"):
        FusionLogitsProcessor(gpt2.calibrator, gpt2.tokenizer, EXACT, target=encoder)
