"""Each token of a text is explained with the numbers that ``generate`` would use."""

import math

import pytest
import torch

from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, DataError
from fusion_detox.files.models import load_target
from fusion_detox.generation.explanation import explain_text, recent_divergence
from fusion_detox.generation.sampling import Job, Sampling, generate_rows, pad_token_id
from fusion_detox.processor import FusionLogitsProcessor

GIVEN = " reads that nobody wants to hear your stupid opinion, idiot. Shut up, naïve 🙂 school."


@pytest.fixture
def target(target_folder):
    return load_target(target_folder, device="cpu")


@pytest.fixture
def fused(calibrator, target):
    model, tokenizer = target
    return FusionLogitsProcessor(
        calibrator,
        tokenizer,
        FusionConfig(strength=2.0, context_kl=0.5, context_threshold=0.1, plausibility=0.0),
        pad_token_id=pad_token_id(model, tokenizer),
        verify="off",
    )


@pytest.fixture
def given(target, fused):
    """A text whose calibrator tokens exceed the calibrator's context of 32."""
    return explain_text(*target, fused, "She", GIVEN, top=4)


def test_a_given_text_is_explained_completely(given, target, fused):
    _, tokenizer = target
    assert given.source == "given"
    assert "".join(given.prompt_tokens) == "<s>She"[-len("".join(given.prompt_tokens)) :]
    ids = [token.step.written.token_id for token in given.tokens]
    assert tokenizer("She" + GIVEN)["input_ids"][-len(ids) :] == ids
    assert "".join(given.calibrator_tokens) == "She" + GIVEN
    assert len(fused.reading(tokenizer("She" + GIVEN)["input_ids"]).path) > 32


def test_the_numbers_are_those_of_the_processor(given, target, fused):
    model, tokenizer = target
    ids = tokenizer("She" + GIVEN)["input_ids"]
    start = len(ids) - len(given.tokens)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    for n, token in enumerate(given.tokens):
        before = torch.log_softmax(logits[start + n - 1], -1)
        after, strength = fused.with_strength(
            torch.tensor([ids[: start + n]]), logits[start + n - 1][None]
        )
        written = token.step.written
        assert written.target_log_prob == pytest.approx(before[written.token_id].item(), abs=1e-4)
        assert written.fused_log_prob == pytest.approx(after[0, written.token_id].item(), abs=1e-4)
        assert token.strength == strength.item()
        for found, logs in ((token.before, before), (token.after, after[0])):
            assert [one.change.token_id for one in found] == logs.topk(4).indices.tolist()
        kl = (after[0].exp() * (after[0] - before)).sum().item()
        assert token.step.kl == pytest.approx(kl, abs=1e-4)


def test_the_divergence_is_what_the_strength_follows(given):
    """context_kl=0.5, context_threshold=0.1: the strength is 2 (d - 0.1) / 0.4 within 0..2."""
    strengths = [2.0 * min(1.0, max(0.0, (t.divergence - 0.1) / 0.4)) for t in given.tokens]
    assert [token.strength for token in given.tokens] == pytest.approx(strengths, abs=1e-3)


def test_the_divergence_of_any_length_is_that_of_the_decoder(calibrator):
    """Including texts whose window has moved, and without a reference."""
    from fusion_detox.decoding.session import CalibratorSession

    path = tuple(torch.randint(1, 300, (70,), generator=torch.Generator().manual_seed(0)).tolist())
    paths = [path[:n] for n in (0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 64, 70)]
    expected = CalibratorSession(calibrator, device=calibrator.device).recent_divergence(paths)
    assert recent_divergence(calibrator, paths) == pytest.approx(expected, abs=1e-4)
    calibrator.reference = None
    assert recent_divergence(calibrator, paths[:2]) == [None, None]


def test_healing_is_what_the_calibrator_cuts_anew(given):
    """The word "stupid" is one token of the calibrator, but several of the target."""
    healed = [token for token in given.tokens if token.healed]
    assert any(token.healed[1] == (" stupid",) for token in healed)
    for token in healed:
        before, after = map("".join, token.healed)
        assert after == before + token.text
        assert token.healed[0][0] != token.healed[1][0]
        assert token.open_word.endswith(before)


def test_without_strength_nothing_changes(target, fused):
    found = explain_text(*target, fused.with_settings(strength=0.0), "She", GIVEN)
    assert {token.step.written.change for token in found.tokens} == {0.0}
    assert (found.mean_kl, found.held_back) == (0.0, 0)


@pytest.mark.parametrize("with_fusion", [True, False])
def test_a_generated_text_is_the_one_that_generate_writes(target, fused, with_fusion):
    sampling = Sampling(max_new_tokens=8, seed=3)
    found = explain_text(*target, fused, "She reads", sampling=sampling, fused=with_fusion)
    processor = fused if with_fusion else None
    (row,) = generate_rows(*target, [Job(0, 0, "She reads")], sampling, processor=processor)
    ids = tuple(token.step.written.token_id for token in found.tokens)
    assert ids == row.completion.token_ids
    assert found.source == ("fused" if with_fusion else "base")


def test_a_chat_is_explained_without_its_markup(chat_folder, calibrator):
    model, tokenizer = load_target(chat_folder, device="cpu")
    processor = FusionLogitsProcessor(calibrator, tokenizer, verify="off")
    found = explain_text(model, tokenizer, processor, "Hello?", "Go away.", chat=True)
    assert found.prompt_tokens[0] == "<|im_start|>"
    assert "".join(found.calibrator_tokens) == "Hello?\nGo away."
    assert found.text == "Go away."


def test_json_holds_the_numbers(given):
    values = given.to_dict()
    assert (values["format"], values["prompt"], values["source"]) == (1, "She", "given")
    first, token = values["tokens"][0], given.tokens[0]
    assert first["probability"] == math.exp(token.step.written.target_log_prob)
    assert [one["id"] for one in first["after"]] == [one.change.token_id for one in token.after]


def test_there_must_be_something_to_explain(target, fused):
    with pytest.raises(DataError, match="no token to explain: the text is empty"):
        explain_text(*target, fused, "She", "")
    with pytest.raises(DataError, match="prompt 0 is empty"):
        explain_text(*target, fused, " ")
    with pytest.raises(ConfigError, match="top must be a whole number of at least 1"):
        explain_text(*target, fused, "She", "x", top=0)
    with pytest.raises(DataError, match=r"has \d+ tokens with its prompt, .* 64 positions"):
        explain_text(*target, fused, "She", GIVEN * 5)
    assert explain_text(*target, fused, "", "She").tokens
