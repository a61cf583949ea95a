"""Completions: independent of the batch, from the right distribution, and stored on disk."""

import functools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor

from fusion_detox.errors import ConfigError, DataError, DataFileError, ModelError
from fusion_detox.files.journal import append_row
from fusion_detox.generation.completion_file import CompletionFile, CompletionWriter
from fusion_detox.generation.explain import TokenChange, explain, explain_steps
from fusion_detox.generation.sampling import (
    Completion,
    Job,
    Row,
    Sampling,
    _hashed_gumbel,
    _key,
    _KeyedDraw,
    continuation_text,
    generate_rows,
    jobs,
    pad_token_id,
    prompt_ids,
)

PROMPTS = ["You are a", "The weather was fine, so we walked", "She", "What a damn", "In 1987 the"]
SETTINGS = {"model": "tiny", "fusion": {"strength": 1.0}}


class Ban(LogitsProcessor):
    """Forbids some tokens, without changing its input."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        out = scores.clone()
        out[:, self.ids] = -torch.inf
        return out


@pytest.fixture(scope="module")
def target(make_llama, byte_tokenizer):
    model = make_llama(len(byte_tokenizer), seed=3)
    model.generation_config.eos_token_id = None
    return model


def rows(model, tokenizer, prompts=PROMPTS, processor=None, batch_size=8, base=False, **sampling):
    how = Sampling(**{"max_new_tokens": 8, **sampling})
    wanted = jobs(prompts, how.samples)
    found = generate_rows(
        model,
        tokenizer,
        wanted,
        how,
        processor=processor,
        with_base=base,
        batch_size=batch_size,
    )
    return list(found)


@pytest.mark.parametrize("sampling", [{"greedy": True}, {}, {"top_k": 5, "temperature": 0.7}])
def test_a_completion_does_not_depend_on_its_batch(target, byte_tokenizer, sampling):
    together = rows(target, byte_tokenizer, batch_size=5, **sampling)
    assert rows(target, byte_tokenizer, batch_size=1, **sampling) == together
    assert rows(target, byte_tokenizer, batch_size=2, **sampling) == together


def test_resumed_run_equals_the_whole_run(target, byte_tokenizer):
    sampling = Sampling(max_new_tokens=6, samples=3)
    wanted = jobs(PROMPTS, 3)
    whole = list(generate_rows(target, byte_tokenizer, wanted, sampling, batch_size=4))
    rest = list(generate_rows(target, byte_tokenizer, wanted[4::2], sampling, batch_size=3))
    assert rest == whole[4::2]


def test_seeds_and_samples_differ(target, byte_tokenizer):
    first, second = rows(target, byte_tokenizer, PROMPTS[:1], samples=2)
    assert first.completion != second.completion
    (other,) = rows(target, byte_tokenizer, PROMPTS[:1], seed=1)
    assert other.completion != first.completion
    assert rows(target, byte_tokenizer, PROMPTS[:1])[0].completion == first.completion


def test_greedy_equals_generate(target, byte_tokenizer):
    (row,) = rows(target, byte_tokenizer, PROMPTS[1:2], greedy=True)
    ids = byte_tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False)
    expected = target.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert list(row.completion.token_ids) == expected[0, ids["input_ids"].shape[1] :].tolist()


def test_fused_and_base_share_their_noise(target, byte_tokenizer):
    found = rows(target, byte_tokenizer, base=True)
    assert all(row.completion == row.base for row in found)
    banned = found[0].completion.token_ids[3]
    fused = rows(target, byte_tokenizer, processor=Ban([banned]), base=True)[0]
    assert fused.base == found[0].base
    assert fused.completion.token_ids[:3] == fused.base.token_ids[:3]
    assert banned not in fused.completion.token_ids
    assert rows(target, byte_tokenizer, processor=Ban([banned]))[0].base is None


def test_completion_stops_at_end_of_text(target, byte_tokenizer, make_llama):
    (free,) = rows(target, byte_tokenizer, PROMPTS[:1])
    model = make_llama(len(byte_tokenizer), seed=3)
    model.generation_config.eos_token_id = [free.completion.token_ids[4], 399]
    (row,) = rows(model, byte_tokenizer, PROMPTS[:1])
    end = free.completion.token_ids.index(free.completion.token_ids[4])
    assert row.completion.token_ids == free.completion.token_ids[:end]
    assert row.completion.finished
    assert not free.completion.finished
    # A finished row waits for the rest of its batch and does not change.
    assert rows(model, byte_tokenizer)[0] == row


@given(st.integers(0, 2**31), st.integers(0, 50), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_draws_follow_the_distribution(seed, step, size):
    torch.manual_seed(seed)
    logits = 2 * torch.randn(size)
    logits[torch.rand(size) < 0.3] = -torch.inf
    logits[0] = 0.0
    draws = 4000
    keys = [_key(seed, Job(i, 0, "")) for i in range(draws)]
    ids = torch.zeros(draws, 7 + step, dtype=torch.long)
    out = _KeyedDraw(keys, 7)(ids, logits.expand(draws, -1))
    assert (torch.isfinite(out).sum(-1) == 1).all()
    counts = torch.bincount(out.argmax(-1), minlength=size).double()
    probs = logits.double().softmax(-1)
    assert (counts[probs == 0] == 0).all()
    expected = draws * probs
    deviation = (counts - expected).abs() / (expected * (1 - probs)).sqrt().clamp_min(1)
    assert deviation.max() < 6


def test_noise_is_standard_gumbel_and_fresh_at_each_step():
    keys = torch.tensor([_key(0, Job(i, 0, "")) for i in range(200)])
    noise = torch.stack([_hashed_gumbel(keys[:, None], s, torch.arange(200)) for s in (0, 1)])
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.05
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1].item()) < 0.02
    assert abs(torch.corrcoef(noise[0, :2])[0, 1].item()) < 0.3


def test_sentencepiece_keeps_the_space_before_a_completion(sentencepiece_tokenizer):
    prompt = sentencepiece_tokenizer("The weather")["input_ids"]
    whole = sentencepiece_tokenizer("The weather was fine")["input_ids"]
    assert whole[: len(prompt)] == prompt
    text = continuation_text(sentencepiece_tokenizer, prompt, whole[len(prompt) :])
    assert text == " was fine"


def test_padding_comes_from_tokenizer_or_model(target, byte_tokenizer, other_tokenizer):
    assert pad_token_id(target, byte_tokenizer) == byte_tokenizer.eos_token_id
    assert pad_token_id(target, other_tokenizer) == other_tokenizer.pad_token_id


def test_scores_that_are_not_finite_raise(byte_tokenizer, make_llama):
    model = make_llama(len(byte_tokenizer))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ModelError, match=r"scores after .* tokens are not finite: its weights"):
        rows(model, byte_tokenizer)


def test_out_of_memory_error_names_the_batch(target, byte_tokenizer, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(target, "generate", full)
    with pytest.raises(ModelError, match=r"cpu ran out of memory .* 5 texts .* smaller batch"):
        rows(target, byte_tokenizer)


def test_a_prompt_too_long_for_the_model_raises_before_generation(target, byte_tokenizer):
    with pytest.raises(DataError, match=r"prompt 1 has \d+ tokens, .* exceeds the 64 positions"):
        rows(target, byte_tokenizer, ["short", "long " * 40])


def test_end_of_text_token_added_by_the_tokenizer_is_removed(target, byte_tokenizer, make_llama):
    model = make_llama(len(byte_tokenizer))
    ids = prompt_ids(model, byte_tokenizer, Job(0, 0, "She<|endoftext|>"), 4)
    assert ids == byte_tokenizer("She")["input_ids"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, but is 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, but is -1"),
        ({"top_k": -5}, "top_k must be a whole number of at least 0, but is -5"),
        ({"samples": 0}, "samples must be a whole number of at least 1, but is 0"),
        ({"temperature": 0.0}, "temperature must be a number above 0, .* set greedy"),
        ({"temperature": math.nan}, "temperature must be a number above 0"),
        ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1, but is 0.0"),
        ({"top_p": 1.5}, "top_p must be a number above 0 and at most 1, but is 1.5"),
        ({"greedy": True, "samples": 2}, "2 greedy samples of a prompt would be identical"),
    ],
)
def test_sampling_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


def test_jobs():
    assert jobs(["a", "b"], 2) == [Job(0, 0, "a"), Job(0, 1, "a"), Job(1, 0, "b"), Job(1, 1, "b")]
    with pytest.raises(DataError, match="list of prompts is empty"):
        jobs([])
    with pytest.raises(DataError, match="prompt 1 is empty"):
        jobs(["a", " \n"])
    with pytest.raises(DataError, match=r"prompt 0 is not valid Unicode text \(character 2"):
        jobs(["ab\udcff"])


def row(index, sample=0, prompt="p", text="é\n\u2028"):
    return Row(Job(index, sample, prompt), Completion(text, (1, 2), False), None)


def write(path, *written, **options):
    file = CompletionFile(path, SETTINGS, **options)
    with file.open() as writer:
        for one in written:
            writer.write(one)
    return file


def test_rows_are_json_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    twin = Row(Job(1, 0, "q"), Completion("a", (1,), True), Completion("b", (2, 3), False))
    write(path, row(0), twin)
    first, second = map(json.loads, path.read_bytes().split(b"\n")[:-1])
    assert first == {
        "index": 0,
        "sample": 0,
        "prompt": "p",
        "completion": "é\n\u2028",
        "tokens": 2,
        "finish": "length",
        "settings": SETTINGS,
    }
    assert (second["finish"], second["base"]) == ("stop", "b")


@pytest.mark.parametrize("cut", [1, 2, 11, 40])
def test_an_incomplete_last_line_is_written_again(tmp_path, cut):
    path = tmp_path / "out.jsonl"
    write(path, row(0), row(1))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + cut] if cut < 40 else whole[:-1])
    wanted = [row(i).job for i in range(3)]
    file = CompletionFile(path, SETTINGS)
    assert path.read_bytes() != whole, "reading must not change the file"
    assert file.missing(wanted) == wanted[1:]
    write(path, row(1))
    assert path.read_bytes() == whole


def test_no_file_is_created_before_open(tmp_path):
    CompletionFile(tmp_path / "out.jsonl", SETTINGS)
    assert not list(tmp_path.iterdir())


def test_overwrite_starts_over(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("a diary\n")
    write(path, row(0), overwrite=True)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("content", ["a diary", "a diary\n", '{"prompt": "x"}\n', "[1]\n", "\n\n"])
def test_a_file_of_another_kind_is_not_changed(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"line 1 of .*out.jsonl is not a row of completions"):
        write(path, row(0))
    assert path.read_text() == content


def test_different_settings_raise_and_are_named(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, row(0))
    with pytest.raises(DataError, match=r"\(fusion.strength was 1.0, now 2.0\); choose another"):
        CompletionFile(path, {"model": "tiny", "fusion": {"strength": 2.0}})


def test_different_prompts_raise(tmp_path):
    path = tmp_path / "out.jsonl"
    file = write(path, row(0))
    file = CompletionFile(path, SETTINGS)
    with pytest.raises(DataError, match="prompt 0 was 'p', now it is 'q'; choose another output"):
        file.missing([Job(0, 0, "q")])


def test_a_full_disk_keeps_the_rows_already_written(tmp_path):
    class Full:
        taken = b""

        def write(self, data):
            if len(self.taken) + len(data) > 300:
                raise OSError(28, "No space left on device")
            part = bytes(data[:7])
            self.taken += part
            return len(part)

        def flush(self):
            pass

    stream = Full()
    writer = CompletionWriter(functools.partial(append_row, stream), "out.jsonl", SETTINGS)
    writer.write(row(0))
    with pytest.raises(DataFileError, match=r"out.jsonl: No space left .* 1 rows of this run are"):
        writer.write(row(1, text="long " * 50))
    path = tmp_path / "out.jsonl"
    path.write_bytes(stream.taken)
    assert CompletionFile(path, SETTINGS).missing([row(0).job, row(1).job]) == [row(1).job]


def test_explanation_names_lowered_and_raised_tokens():
    target = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])) + 3.0
    fused = torch.log(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]]))
    first, second = explain_steps(target, fused, [0, 2])
    assert first.written.change == pytest.approx(math.log(1 / 7), abs=1e-5)
    assert first.held_back()
    assert not first.held_back(nats=2.0)
    assert [change.token_id for change in first.lowered] == [0]
    assert [change.token_id for change in first.raised] == [1, 2]
    assert first.raised[0].moved == pytest.approx(0.5)
    expected = 0.1 * math.log(1 / 7) + 0.7 * math.log(3.5) + 0.2 * math.log(2)
    assert first.kl == pytest.approx(expected, abs=1e-5)
    assert (second.written.change, second.kl) == (0.0, 0.0)
    assert second.lowered == second.raised == ()
    assert TokenChange(0, -math.inf, -math.inf).change == 0.0


def test_explain_calls_the_processor_like_generate(target, byte_tokenizer):
    prompt = byte_tokenizer("You are a")["input_ids"]
    seen = []

    class Spy(Ban):
        def __call__(self, input_ids, scores):
            seen.append(tuple(input_ids[0].tolist()))
            return super().__call__(input_ids, scores)

    steps = explain(target, Spy([7]), prompt, [5, 7, 9])
    assert seen == [tuple(prompt), (*prompt, 5), (*prompt, 5, 7)]
    assert [step.written.token_id for step in steps] == [5, 7, 9]
    assert steps[1].held_back(nats=100)
    assert explain(target, Spy([7]), prompt, []) == []
    with pytest.raises(DataError, match="give at least one token, such as the BOS"):
        explain(target, Spy([7]), [], [5])
    with pytest.raises(DataError, match="3 tokens need one row each"):
        explain_steps(torch.zeros(2, 4), torch.zeros(2, 4), [1, 2, 3])
