"""Modes beyond the search: drafts, inputs, caches, streaming, stopping and pipelines."""

import copy
import logging
import math
import threading

import pytest
import torch
import transformers
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)

from fusion_detox import Calibrator, FusionConfig, FusionLogitsProcessor
from fusion_detox.errors import ConfigError, VocabularyError
from fusion_detox.fusion import fuse

from .conftest import CONFIG, TEXTS, Case
from .modes import modes_of

OLD = transformers.__version__.startswith("4.")


def names(mode):
    return mode.name


def alone(case, which=1):
    """Return the inputs for one prompt of the case, without padding."""
    return {"input_ids": case.encode([TEXTS[which]])["input_ids"]}


def test_the_definition_changes_every_target(case):
    """The definition differs from the target alone, so the suite can fail."""
    before = case.search(
        case.inputs["input_ids"].tolist(), max_new_tokens=6, fused=lambda row, scores: scores
    )
    assert before.sample()[0] != case.greedy(TEXTS, 6)


@pytest.mark.parametrize("rule", ["product", "mixture"])
def test_other_rules(case, rule):
    config = FusionConfig(rule=rule, strength=0.6, plausibility=1e-3)
    processor = FusionLogitsProcessor(
        case.calibrator, case.tokenizer, config, pad_token_id=case.pad
    )
    prompts = case.inputs["input_ids"].tolist()
    wanted = case.search(prompts, max_new_tokens=4, fused=case.definition_of(config)).sample()[0]
    assert case.generate(processor=processor, max_new_tokens=4).tolist() == wanted


@pytest.mark.parametrize(
    "config",
    [
        FusionConfig(rule="mixture", strength=1.0, plausibility=1e-3),
        FusionConfig(rule="product", strength=1.0, floor=0.0, plausibility=1e-3),
        FusionConfig(floor=0.0),
        FusionConfig(floor=0.0, clip=math.inf, kl_budget=0.5),
    ],
    ids=["mixture", "product", "contrast", "contrast, no clip"],
)
def test_extreme_settings_never_yield_nan(case, config):
    """Inside a word, the calibrator often rules out every token that the target would write."""
    processor = case.processor.with_settings(**config.to_dict() | {"clip": config.clip})
    texts = ["The weather was fine, you idio", "What a damn stupi", "東京, emoji"]
    ids = case.encode(texts)["input_ids"]
    scores = torch.randn(3, case.width, generator=torch.Generator().manual_seed(1)) * 4
    fused = processor(ids, scores)
    assert not fused.isnan().any()
    torch.testing.assert_close(fused.exp().sum(-1), torch.ones(3), atol=1e-4, rtol=0)
    # The calibrator gives no probability to any token, so the target's distribution remains.
    nothing = torch.zeros_like(scores)
    mapped = torch.ones(case.width, dtype=torch.bool)
    own = fuse(scores, nothing, nothing, mapped, config)
    torch.testing.assert_close(own, scores.log_softmax(-1), atol=1e-5, rtol=1e-5)


# Drafts


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mode", modes_of("test_assisted_greedy_equals_greedy"), ids=names)
def test_assisted_greedy_equals_greedy(case, mode):
    for which in (0, 1):
        found = case.generate(**alone(case, which), max_new_tokens=8, **mode.options(case))
        assert found.tolist() == case.greedy([TEXTS[which]], 8)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mode", modes_of("test_assisted_sampling"), ids=names)
def test_assisted_sampling(case, mode):
    """In the same loop, the library and the definition draw and accept the same tokens."""
    options = {"max_new_tokens": 8, "do_sample": True, **alone(case), **mode.options(case)}
    found, wanted = (
        # transformers adapts the assistant's settings to the acceptance rate of its drafts.
        case.generate(processor=processor, **copy.deepcopy(options))
        for processor in (case.processor, case.reference)
    )
    assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("smaller", [True, False])
def test_assistant_of_another_vocabulary(cases, make_llama, smaller, caplog):
    case, other = cases("bytes"), cases("sentencepiece")
    width = other.width if smaller else len(other.tokenizer) + 9000
    assistant = make_llama(width, seed=9, eos_token_id=other.eos, bos_token_id=1)
    options = {
        "tokenizer": case.tokenizer,
        "assistant_tokenizer": other.tokenizer,
        "assistant_model": assistant,
        "max_new_tokens": 8,
        **alone(case),
    }
    wanted = case.greedy([TEXTS[1]], 8)
    processor = FusionLogitsProcessor(
        case.calibrator,
        case.tokenizer,
        CONFIG,
        pad_token_id=case.pad,
        assistant_tokenizer=Wide(width),
    )
    assert case.generate(processor=processor, **options).tolist() == wanted
    assert not ours(caplog)
    plain = FusionLogitsProcessor(case.calibrator, case.tokenizer, CONFIG, pad_token_id=case.pad)
    if smaller:
        assert case.generate(processor=plain, **options).tolist() == wanted
    else:
        with pytest.raises(VocabularyError, match="pass assistant_tokenizer too"):
            case.generate(processor=plain, **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mode", modes_of("test_assistant_of_another_vocabulary_sampling"))
def test_assistant_of_another_vocabulary_sampling(cases, make_llama, mode):
    case, other = cases("bytes"), cases("sentencepiece")
    options = {
        "tokenizer": case.tokenizer,
        "assistant_tokenizer": other.tokenizer,
        "max_new_tokens": 8,
        "do_sample": True,
        **alone(case),
    }
    options["assistant_model"] = make_llama(other.width, seed=9, eos_token_id=other.eos)
    case.generate(**options)  # the first call changes the assistant in place
    found = case.generate(**options)
    wanted = case.generate(processor=case.reference, **options)
    assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ensemble_weight(one):
    if not hasattr(GenerationConfig(), "assistant_ensemble_weight"):
        pytest.skip("this version of transformers has no assistant_ensemble_weight")
    options = {"assistant_model": one.assistant, "do_sample": True, "max_new_tokens": 8}
    options = {**options, **alone(one), "assistant_ensemble_weight": 0.6}
    found = one.generate(**copy.deepcopy(options))
    assert torch.equal(found, one.generate(processor=one.reference, **copy.deepcopy(options)))


class Wide:
    """Stands in for a tokenizer; only its length is used."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


def ours(caplog):
    """Return what the library itself has logged."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("fusion_detox")]


# Inputs


@pytest.mark.parametrize("name", ["same", "bytes"])
def test_a_row_in_a_batch_equals_the_row_alone(cases, name):
    """The byte-level target has a padding token; the other one pads with its end-of-text token."""
    case = cases(name)
    assert (case.pad == case.eos) == (name == "same")
    rows = case.generate(max_new_tokens=6)[:, case.length :].tolist()
    for which, row in enumerate(rows):
        prompt = alone(case, which)
        found = case.generate(**prompt, max_new_tokens=6)[0, prompt["input_ids"].shape[1] :]
        assert found.tolist() == row == case.plain[which]


def test_padding_with_an_ordinary_token(one, make_llama):
    """Except at the start of a row, that token is text."""
    (pad,) = one.tokenizer("!", add_special_tokens=False)["input_ids"]
    case = Case(one.calibrator, one.tokenizer, make_llama, pad=pad)
    texts = ["Shut up!", "What a thing to say! Shut up, you idio"]
    inputs = case.encode(texts)
    assert (inputs["input_ids"][0, 0], inputs["input_ids"][0, -1]) == (pad, pad)
    assert case.generate(**inputs).tolist() == case.greedy(texts, 5)


def test_right_padding_causes_a_warning(one, caplog, monkeypatch):
    # Version 4 logs the warning to standard error only.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ids, mask = one.inputs["input_ids"], one.inputs["attention_mask"]
    turned = torch.cat([ids[:1].roll(int(mask[0].sum()), 1), ids[1:]])
    mask = torch.cat([mask[:1].flip(1), mask[1:]])
    one.generate(input_ids=turned, attention_mask=mask)
    assert "right-padding was detected" in caplog.text


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_chat_template(cases, make_llama, name, end):
    pytest.importorskip("jinja2")
    old = cases(name)
    tokenizer = copy.deepcopy(old.tokenizer)
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    case = Case(old.calibrator, tokenizer, make_llama)
    chats = [
        [{"role": "user", "content": "Shut up, you idiot."}],
        [
            {"role": "system", "content": "Thank you so much"},
            {"role": "user", "content": "What a thing to say!"},
            {"role": "assistant", "content": "She reads."},
            {"role": "user", "content": "In 1987"},
        ],
    ]
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    inputs = case.encode(texts)
    assert (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|im_start|>")).sum() == 7
    found = case.generate(**inputs)
    assert found.tolist() == case.greedy(texts, 5)


def embedded(case):
    mask = case.inputs["attention_mask"]
    embeds = case.model.get_input_embeddings()(case.inputs["input_ids"])
    return {"inputs_embeds": embeds.detach(), "attention_mask": mask}


def test_embeddings_beside_ids(case):
    found = case.generate(**embedded(case), input_ids=case.inputs["input_ids"])
    assert found.tolist() == case.greedy(TEXTS, 5)


def test_embeddings_alone_warn(case, caplog):
    processor = FusionLogitsProcessor(
        case.calibrator, case.tokenizer, CONFIG, pad_token_id=case.pad
    )
    found = case.generate(processor=processor, **embedded(case))
    search = case.search(
        case.inputs["input_ids"].tolist(),
        max_new_tokens=5,
        fused=lambda row, scores: case.definition(row[case.length :], scores),
    )
    assert found.tolist() == [row[case.length :] for row in search.sample()[0]]
    case.generate(processor=processor, **embedded(case))
    (warning,) = ours(caplog)
    assert "the calibrator sees only what is generated from here on" in warning
    # With the text passed in, results equal those with ids, however the rows are reordered.
    caplog.clear()
    following = processor.following(TEXTS)
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        found = case.generate(processor=following, **embedded(case), **options)
        wanted = case.generate(**options)
        assert found.tolist() == wanted[:, case.length :].tolist()
    assert not ours(caplog)


def test_following_is_checked(one):
    with pytest.raises(ConfigError, match="was given no text"):
        one.processor.following([])
    with pytest.raises(ConfigError, match="given 3 texts, but there are 2 rows"):
        one.generate(processor=one.processor.following(["a", "b", "c"]), **embedded(one))


def test_following_reads_the_text_as_if_it_were_in_the_row(case):
    """This holds even if the row begins with padding or a beginning-of-text token."""
    row = case.tokenizer(" nobody", add_special_tokens=False)["input_ids"]
    scores = torch.randn(2, case.width, generator=torch.Generator().manual_seed(0))
    whole = case.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"] + row
    found = case.processor.following(TEXTS[0]).fuse_rows(
        [row, [case.pad, case.tokenizer.bos_token_id, *row]], scores
    )
    wanted = torch.stack([case.definition(whole, score) for score in scores])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_with_settings_shares_the_cache(one):
    scores = torch.randn(1, one.width)
    ids = one.inputs["input_ids"][1:]
    weaker = one.processor.with_settings(strength=0.5)
    wanted = one.definition_of(CONFIG.replace(strength=0.5))(ids[0].tolist(), scores[0])
    torch.testing.assert_close(weaker(ids, scores)[0], wanted, atol=1e-4, rtol=1e-4)
    assert one.processor.config == CONFIG
    with pytest.raises(ConfigError, match="strength must be a number"):
        one.processor.with_settings(strength=-1)
    bare = Calibrator(one.calibrator.clean, None, one.calibrator.tokenizer, context_length=16)
    mixture = FusionLogitsProcessor(bare, one.tokenizer, FusionConfig(rule="mixture", strength=0.5))
    with pytest.raises(ConfigError, match="needs a reference model"):
        mixture.with_settings(rule="contrast")


def test_continuing_from_a_cache(case):
    """Three turns share one cache, and all ids are passed each time."""
    ids, cache = alone(case)["input_ids"], None
    for turn in (" nobody", "\nThe weather", " idiot!"):
        found = case.generate(input_ids=ids, past_key_values=cache, return_dict_in_generate=True)
        cache = found.past_key_values
        assert found.sequences.tolist() == case.search(ids.tolist(), max_new_tokens=5).sample()[0]
        new = case.tokenizer(turn, add_special_tokens=False)["input_ids"]
        ids = torch.cat([found.sequences, torch.tensor([new])], 1)


def test_continuing_with_only_new_ids(one):
    if OLD:
        pytest.skip("transformers 4 fails if it gets only new ids, fused or not")
    ids = alone(one)["input_ids"]
    hidden = ids.shape[1] - 3
    with torch.no_grad():
        cache = one.model(ids[:, :hidden]).past_key_values
    options = {"input_ids": ids[:, hidden:], "attention_mask": torch.ones_like(ids)}
    found = one.generate(past_key_values=copy.deepcopy(cache), **options)
    search = one.search(
        ids.tolist(),
        max_new_tokens=5,
        fused=lambda row, scores: one.definition(row[hidden:], scores),
    )
    assert found.tolist() == [row[hidden:] for row in search.sample()[0]]
    text = one.tokenizer.decode(ids[0, :hidden])
    found = one.generate(processor=one.processor.following(text), past_key_values=cache, **options)
    assert found.tolist() == [row[hidden:] for row in one.greedy(TEXTS[1:], 5)]


def test_token_healing(one):
    ids = alone(one)["input_ids"]
    found = one.generate(input_ids=ids, token_healing=True, tokenizer=one.tokenizer)
    healed = found[:, : ids.shape[1]].tolist()
    assert found.tolist() == one.search(healed, max_new_tokens=5).sample()[0]


# Caches, compilation and output


@pytest.mark.parametrize("mode", modes_of("test_caches_and_chunked_prefill"), ids=names)
def test_caches_and_chunked_prefill(case, mode):
    options = mode.options(case)
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("an offloaded cache needs an accelerator")
    texts, inputs = TEXTS, case.inputs
    if OLD and "prefill_chunk_size" in options:  # transformers 4 does not skip padding in this case
        texts, inputs = TEXTS[1:], alone(case)
    assert case.generate(**inputs, **options).tolist() == case.greedy(texts, 5)


def test_compiled_forward(one):
    """Uses the compiler's front end only: its code generator takes minutes and is not tested."""
    model = copy.deepcopy(one.model)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    try:
        found = one.generate(model=model, cache_implementation="static")
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"the compiler does not work here: {error}")
    finally:
        torch._dynamo.reset()
    assert found.tolist() == one.greedy(TEXTS, 5)


def test_streaming(one, capsys):
    one.generate(**alone(one), streamer=TextStreamer(one.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == one.tokenizer.decode(one.plain[1][:5]) + "\n"


def test_streaming_in_a_thread(one):
    streamer = TextIteratorStreamer(one.tokenizer, skip_prompt=True)
    thread = threading.Thread(
        target=one.generate, kwargs={"streamer": streamer, **alone(one)}, daemon=True
    )
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == one.tokenizer.decode(one.plain[1][:5])


def test_stop_strings(one):
    """Stops after the first token that completes the string in greedy search."""
    pieces = [one.definition.token_bytes.get(i, b"") for i in one.plain[1]]
    letter = next(chr(b) for piece in pieces[1:] for b in piece if 33 <= b < 128)
    last = next(k for k, piece in enumerate(pieces) if letter.encode() in piece)
    found = one.generate(
        **alone(one), max_new_tokens=6, stop_strings=[letter], tokenizer=one.tokenizer
    )
    start = alone(one)["input_ids"].shape[1]
    assert found[0, start:].tolist() == one.plain[1][: last + 1]


def test_stopping_criteria(case):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = input_ids.shape[1] >= case.length + 3
            return torch.full((len(input_ids),), done)

    found = case.generate(stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert found.tolist() == case.greedy(TEXTS, 3)


def test_several_end_of_text_tokens(case):
    """Rows finish at different steps and are padded on the right while others continue."""
    ends = [case.eos, case.plain[0][1], case.plain[1][3]]
    found = case.generate(eos_token_id=ends, max_new_tokens=6)
    rows = case.greedy(TEXTS, 6, eos_token_id=ends)
    assert found.tolist() == rows
    assert rows[0][-1] == case.pad != rows[0][case.length]


def test_the_watermark_is_applied_after_fusion(one):
    options = {"watermarking_config": WatermarkingConfig(bias=3.0), "do_sample": True, "top_k": 0}
    found = one.generate(**options)
    assert torch.equal(found, one.generate(processor=one.reference, **options))
    assert not torch.equal(found, one.generate(do_sample=True, top_k=0))


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_pipeline(cases, name):
    case = cases(name)
    tokenizer = copy.deepcopy(case.tokenizer)
    tokenizer.padding_side, tokenizer.pad_token_id = "left", case.pad
    generator = pipeline("text-generation", model=case.model, tokenizer=tokenizer)
    found = generator(
        TEXTS,
        batch_size=2,
        max_new_tokens=5,
        do_sample=False,
        logits_processor=[case.processor],
        return_tensors=True,
    )
    written = [row["generated_token_ids"][-5:] for (row,) in found]
    assert written == [row[:5] for row in case.plain]


def test_custom_generate(one):
    """A user's own decoding loop receives the same list of processors, fusion included."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        mask = kwargs["attention_mask"]
        while not bool(stopping_criteria(input_ids, None).all()):
            logits = model(input_ids=input_ids, attention_mask=mask, **positions(mask)).logits
            best = logits_processor(input_ids, logits[:, -1].float()).argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, best], 1)
            mask = torch.cat([mask, torch.ones_like(best)], 1)
        return input_ids

    def positions(mask):
        return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0), "use_cache": False}

    assert one.generate(custom_generate=loop).tolist() == one.greedy(TEXTS, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 4, "force_words_ids": [[5]]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_strategies_from_the_hub(one, options):
    """transformers 5 no longer implements them, and raises an error that says so."""
    if OLD:
        pytest.skip("transformers 4 uses its own code, or warns")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        one.generate(**alone(one), **options)
