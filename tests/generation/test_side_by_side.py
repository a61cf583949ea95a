"""Both texts are those of ``generate_rows``, and a change of settings acts on the next token."""

import pytest

from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError
from fusion_detox.files.models import load_target
from fusion_detox.generation.sampling import (
    Job,
    Sampling,
    complete_batch,
    generate_rows,
    pad_token_id,
    prompt_ids,
)
from fusion_detox.generation.side_by_side import LiveSettings, write_side_by_side
from fusion_detox.processor import FusionLogitsProcessor

JOB = Job(0, 0, "She reads")


@pytest.fixture
def parts(target_folder, calibrator):
    model, tokenizer = load_target(target_folder, device="cpu")
    processor = FusionLogitsProcessor(
        calibrator,
        tokenizer,
        FusionConfig(strength=3.0, plausibility=0.0),
        pad_token_id=pad_token_id(model, tokenizer),
        verify="off",
    )
    return model, tokenizer, processor


def last(stream):
    return list(stream)[-1]


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=12, greedy=True), Sampling(max_new_tokens=12, seed=4)]
)
def test_both_texts_are_those_of_generate(parts, sampling):
    model, tokenizer, processor = parts
    base, fused = last(write_side_by_side(*parts, JOB, sampling))
    (row,) = generate_rows(model, tokenizer, [JOB], sampling, processor=processor, with_base=True)
    assert tuple(base.ids) == row.base.token_ids
    assert tuple(fused.ids) == row.completion.token_ids
    assert base.ids != fused.ids
    # A character that is unfinished at the end is not shown.
    assert base.text == row.base.text.rstrip("\ufffd")
    assert fused.text == row.completion.text.rstrip("\ufffd")
    assert base.tokens_per_second > 0 < fused.tokens_per_second


def test_a_chat_ends_with_its_turn(chat_folder, calibrator):
    model, tokenizer = load_target(chat_folder, device="cpu")
    processor = FusionLogitsProcessor(calibrator, tokenizer, verify="off")
    job, sampling = Job(0, 0, "She reads", chat=True), Sampling(max_new_tokens=20, seed=1)
    base, fused = last(write_side_by_side(model, tokenizer, processor, job, sampling))
    (row,) = generate_rows(model, tokenizer, [job], sampling, processor=processor, with_base=True)
    assert (tuple(base.ids), base.finished) == (row.base.token_ids, row.base.finished)
    assert (tuple(fused.ids), fused.finished) == (
        row.completion.token_ids,
        row.completion.finished,
    )


def test_a_change_acts_on_the_next_token(parts):
    """Strength 0 for five tokens, then 3: as if the fused text began after five base tokens."""
    model, tokenizer, processor = parts
    sampling = Sampling(max_new_tokens=12, greedy=True)
    live = [LiveSettings(0.0)]
    for base, fused in write_side_by_side(*parts, JOB, sampling, lambda: live[0]):
        if len(fused.ids) == 5:
            assert fused.ids == base.ids
            live[0] = LiveSettings(3.0)
    assert [token.strength for token in fused.tokens] == [0.0] * 5 + [3.0] * 7
    assert {token.replaced for token in fused.tokens[:5]} == {None}
    begun = [*prompt_ids(model, tokenizer, JOB, 12), *base.ids[:5]]
    rest = Sampling(max_new_tokens=7, greedy=True)
    (row,) = complete_batch(model, tokenizer, [JOB], [begun], rest, processor)
    assert fused.ids == [*base.ids[:5], *row.token_ids]
    assert fused.ids != base.ids


def test_a_small_budget_keeps_the_target_s_text(parts):
    base, fused = last(
        write_side_by_side(
            *parts,
            JOB,
            Sampling(max_new_tokens=12, seed=4),
            lambda: LiveSettings(3.0, 1e-6),
        )
    )
    assert base.ids == fused.ids
    assert min(token.strength for token in fused.tokens) < 0.1


def test_replaced_tokens_are_what_the_target_would_write(parts):
    """Up to the first difference, both texts have the same context."""
    base, fused = last(write_side_by_side(*parts, JOB, Sampling(max_new_tokens=12, greedy=True)))
    pairs = zip(base.ids, fused.ids, strict=False)
    first = next(n for n, (one, other) in enumerate(pairs) if one != other)
    assert [token.replaced for token in fused.tokens[:first]] == [None] * first
    assert fused.tokens[first].replaced == base.tokens[first].text
    assert fused.tokens[first].change > 0 > base.tokens[first].change
    assert {token.replaced for token in base.tokens} == {None}


def test_settings_out_of_range_are_refused(parts):
    stream = write_side_by_side(
        *parts, JOB, Sampling(max_new_tokens=2), lambda: LiveSettings(1.0, -1.0)
    )
    with pytest.raises(ConfigError, match="kl_budget must be a number above 0"):
        next(stream)
