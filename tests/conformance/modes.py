"""Every decoding mode in the suite, how fusion behaves in it, and its test.

``document.py`` writes the table in docs/decoding-modes.md from this list, and the tests take
their cases from it, so the table states exactly what is tested. This module imports nothing from
the package: a mode's options are a function of the case that a test runs (see ``Case`` in
conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

State = Literal["exact", "note", "refused"]


class Mode(NamedTuple):
    """A decoding mode.

    Attributes:
        group: Heading in the table.
        name: The user's name for it.
        state: ``exact``: every token and score equals the definition's. ``note``: it works, with
            the restriction in the note. ``refused``: it does not work, and the note says why.
        test: The test function that covers it.
        options: Options of ``generate``, for tests whose modes differ only in them.
        note: What a user needs to know.
    """

    group: str
    name: str
    state: State
    test: str
    options: Callable[[Any], dict[str, Any]] = lambda case: {}
    note: str = ""


def search(group: str, name: str, note: str = "", **options: Any) -> Mode:
    """Return a mode with fixed options, compared with the definition of the search itself."""
    return Mode(group, name, "exact", "test_equals_the_definition", lambda case: options, note)


def with_case(group: str, name: str, options: Callable[[Any], dict[str, Any]]) -> Mode:
    return Mode(group, name, "exact", "test_equals_the_definition", options)


GREEDY = "Greedy search and sampling"
BEAMS = "Beam search"
BEFORE = "Processors before fusion"
SPECULATIVE = "Speculative decoding"
INPUTS = "Inputs"
RUNTIME = "Caches, compilation and output"
SERVING = "Continuous batching"
OTHER = "Other strategies"


def ending(case: Any, **options: Any) -> dict[str, Any]:
    """Make some texts end early, so that finished and open beams compete."""
    often = [case.plain[0][2], case.plain[1][1], case.plain[1][4]]
    return {"eos_token_id": [case.eos, *often], "max_new_tokens": 6, **options}


def beam(name: str, **options: Any) -> Mode:
    return with_case(BEAMS, name, lambda case: ending(case, **options))


MODES = [
    search(GREEDY, "greedy search"),
    search(GREEDY, "sampling", do_sample=True),
    search(GREEDY, "temperature", do_sample=True, temperature=0.6),
    search(GREEDY, "top-k", do_sample=True, top_k=8),
    search(GREEDY, "top-p", do_sample=True, top_p=0.8),
    search(GREEDY, "min-p", do_sample=True, min_p=0.05),
    search(GREEDY, "typical sampling", do_sample=True, typical_p=0.7),
    search(GREEDY, "epsilon cutoff", do_sample=True, epsilon_cutoff=0.004),
    search(GREEDY, "eta cutoff", do_sample=True, eta_cutoff=0.01),
    search(
        GREEDY,
        "temperature, top-k and top-p together",
        do_sample=True,
        temperature=1.4,
        top_k=40,
        top_p=0.9,
    ),
    search(
        GREEDY,
        "temperature, min-p and typical together",
        do_sample=True,
        temperature=0.8,
        min_p=0.01,
        typical_p=0.9,
        renormalize_logits=True,
    ),
    search(GREEDY, "num_return_sequences", do_sample=True, top_p=0.95, num_return_sequences=3),
    beam("beam search, 2 beams", num_beams=2),
    beam("beam search, 4 beams", num_beams=4, num_return_sequences=2),
    beam("length penalty 0", num_beams=3, length_penalty=0.0),
    beam("length penalty 2", num_beams=3, length_penalty=2.0),
    beam("length penalty -1", num_beams=3, length_penalty=-1.0),
    beam("early stopping", num_beams=3, early_stopping=True),
    beam('early_stopping="never"', num_beams=3, early_stopping="never", length_penalty=0.7),
    beam("beam sampling", num_beams=3, do_sample=True, temperature=1.2),
    beam("beam sampling, top-k and top-p", num_beams=2, do_sample=True, top_k=30, top_p=0.9),
    with_case(
        BEFORE, "repetition penalty", lambda case: {"repetition_penalty": 1.7, "max_new_tokens": 7}
    ),
    search(BEFORE, "no repeated n-grams", no_repeat_ngram_size=1),
    with_case(
        BEFORE,
        "bad words",
        lambda case: {"bad_words_ids": [case.plain[0][:1], case.plain[1][1:3]]},
    ),
    with_case(
        BEFORE,
        "sequence bias",
        lambda case: {"sequence_bias": [[case.plain[0][:1], -4.0], [case.plain[1][:2], -9.0]]},
    ),
    with_case(BEFORE, "min_length", lambda case: {**ending(case), "min_length": case.length + 3}),
    with_case(BEFORE, "min_new_tokens", lambda case: {**ending(case), "min_new_tokens": 2}),
    with_case(
        BEFORE,
        "prefix_allowed_tokens_fn, sampling",
        lambda case: {"prefix_allowed_tokens_fn": case.allowed, "do_sample": True},
    ),
    with_case(
        BEFORE,
        "prefix_allowed_tokens_fn, beams",
        lambda case: ending(case, prefix_allowed_tokens_fn=case.allowed, num_beams=2),
    ),
    with_case(BEFORE, "forced first token", lambda case: {"forced_bos_token_id": 9, "begin": True}),
    with_case(BEFORE, "forced end of text", lambda case: {"forced_eos_token_id": case.eos}),
    with_case(
        BEFORE,
        "exponential length penalty",
        lambda case: {"exponential_decay_length_penalty": (1, 3.0)},
    ),
    with_case(
        BEFORE,
        "suppressed tokens",
        lambda case: {
            "suppress_tokens": case.plain[0][1:3],
            "begin_suppress_tokens": case.plain[1][:1],
        },
    ),
    Mode(
        BEFORE,
        "classifier-free guidance",
        "exact",
        "test_equals_the_definition",
        lambda case: {"guidance_scale": 1.7},
        "Fusion receives the guided scores. It does not work with beams, because transformers does "
        "not reorder the guidance's cache.",
    ),
    with_case(
        BEFORE,
        "classifier-free guidance, negative prompt, sampling",
        lambda case: {
            "guidance_scale": 1.4,
            "negative_prompt_ids": case.negative,
            "do_sample": True,
        },
    ),
    search(BEFORE, "remove_invalid_values", remove_invalid_values=True),
    Mode(
        SPECULATIVE,
        "assistant with the same tokenizer, greedy",
        "exact",
        "test_assisted_greedy_equals_greedy",
        lambda case: {"assistant_model": case.assistant},
    ),
    Mode(
        SPECULATIVE,
        "assistant with the same tokenizer, sampling",
        "exact",
        "test_assisted_sampling",
        lambda case: {"assistant_model": case.assistant},
        "Drafts are fused too, so more of them are accepted.",
    ),
    Mode(
        SPECULATIVE,
        "assistant with another tokenizer, greedy",
        "note",
        "test_assistant_of_another_vocabulary",
        note="Drafts are not fused; accepted tokens are. Pass `assistant_tokenizer=` to the "
        "processor. Without it, drafts from a smaller vocabulary cause a warning, and drafts from "
        "a much larger one an error.",
    ),
    Mode(
        SPECULATIVE,
        "assistant with another tokenizer, sampling",
        "note",
        "test_assistant_of_another_vocabulary_sampling",
        note="As above. transformers reduces the assistant's head to the tokens that both models "
        "have and remembers this for the pair of tokenizers. A second assistant with the same "
        "tokenizers therefore fails, with or without fusion.",
    ),
    Mode(
        SPECULATIVE,
        "early exit of the target itself, greedy",
        "exact",
        "test_assisted_greedy_equals_greedy",
        lambda case: {"assistant_early_exit": 1},
    ),
    Mode(
        SPECULATIVE,
        "assistant_ensemble_weight",
        "note",
        "test_ensemble_weight",
        note="transformers mixes the assistant's distribution into the target's. With the same "
        "tokenizer, the assistant's distribution is fused too. With another tokenizer it is not: "
        "do not use the option then.",
    ),
    Mode(
        SPECULATIVE,
        "prompt lookup, greedy",
        "exact",
        "test_assisted_greedy_equals_greedy",
        lambda case: {"prompt_lookup_num_tokens": 3},
    ),
    Mode(
        SPECULATIVE,
        "prompt lookup, sampling",
        "exact",
        "test_assisted_sampling",
        lambda case: {"prompt_lookup_num_tokens": 3},
    ),
    Mode(
        INPUTS, "ragged batch, left padded", "exact", "test_a_row_in_a_batch_equals_the_row_alone"
    ),
    Mode(
        INPUTS,
        "padding that ends texts too (pad = eos)",
        "exact",
        "test_a_row_in_a_batch_equals_the_row_alone",
    ),
    Mode(
        INPUTS,
        "padding with an ordinary token",
        "exact",
        "test_padding_with_an_ordinary_token",
        note="Pass `pad_token_id=` to the processor.",
    ),
    Mode(
        INPUTS,
        "batch padded on the right",
        "refused",
        "test_right_padding_causes_a_warning",
        note="transformers warns that its results are wrong. The calibrator reads padding after a "
        'text as the end of the text. Set `tokenizer.padding_side = "left"`.',
    ),
    Mode(
        INPUTS,
        "chat template with special tokens",
        "exact",
        "test_chat_template",
        note="The calibrator reads the last request and the answer, without the template's "
        "markup. Other control tokens are line breaks; one that begins or ends a text (bos, eos, "
        "pad, cls, sep) starts a new text.",
    ),
    Mode(
        INPUTS,
        "inputs_embeds beside input_ids",
        "exact",
        "test_embeddings_beside_ids",
    ),
    Mode(
        INPUTS,
        "inputs_embeds alone",
        "note",
        "test_embeddings_alone_warn",
        note="The prompt's text cannot be read from embeddings. A warning says so, and the "
        "calibrator reads only the generated text. Pass the prompt with "
        "`processor.following(text)`.",
    ),
    Mode(
        INPUTS,
        "continuing from past_key_values, all ids given",
        "exact",
        "test_continuing_from_a_cache",
    ),
    Mode(
        INPUTS,
        "continuing from past_key_values, only new ids given",
        "note",
        "test_continuing_with_only_new_ids",
        note="A processor receives only the new ids. Pass the earlier text with "
        "`processor.following(text)`, or give `generate` all ids.",
    ),
    Mode(
        INPUTS,
        "token healing",
        "note",
        "test_token_healing",
        note="`generate` replaces the prompt's last token in a separate search, and runs that "
        "search without custom processors.",
    ),
    Mode(
        RUNTIME,
        "cache_implementation dynamic",
        "exact",
        "test_caches_and_chunked_prefill",
        lambda case: {},
    ),
    Mode(
        RUNTIME,
        "cache_implementation static",
        "exact",
        "test_caches_and_chunked_prefill",
        lambda case: {"cache_implementation": "static"},
    ),
    Mode(
        RUNTIME,
        "cache_implementation offloaded",
        "exact",
        "test_caches_and_chunked_prefill",
        lambda case: {"cache_implementation": "offloaded"},
        "It needs an accelerator, and is tested only if there is one.",
    ),
    Mode(
        RUNTIME,
        "no cache",
        "exact",
        "test_caches_and_chunked_prefill",
        lambda case: {"use_cache": False},
    ),
    Mode(
        RUNTIME,
        "prefill in chunks",
        "exact",
        "test_caches_and_chunked_prefill",
        lambda case: {"prefill_chunk_size": 3},
    ),
    Mode(
        RUNTIME,
        "compiled forward",
        "exact",
        "test_compiled_forward",
        note="Like all processors, this one runs outside the compiled part.",
    ),
    Mode(RUNTIME, "TextStreamer", "exact", "test_streaming"),
    Mode(RUNTIME, "TextIteratorStreamer in a thread", "exact", "test_streaming_in_a_thread"),
    Mode(RUNTIME, "stop strings", "exact", "test_stop_strings"),
    Mode(RUNTIME, "custom stopping criteria", "exact", "test_stopping_criteria"),
    Mode(RUNTIME, "several end-of-text tokens", "exact", "test_several_end_of_text_tokens"),
    Mode(
        RUNTIME,
        "watermarks",
        "exact",
        "test_the_watermark_is_applied_after_fusion",
    ),
    Mode(RUNTIME, 'pipeline("text-generation")', "exact", "test_pipeline"),
    Mode(RUNTIME, "custom_generate, a function", "exact", "test_custom_generate"),
    Mode(RUNTIME, "output_scores, output_logits", "exact", "test_equals_the_definition"),
    Mode(
        SERVING,
        "ContinuousBatchingManager",
        "exact",
        "test_continuous_batching_equals_greedy",
        note="With `attach(manager, processor)` of `fusion_detox.integrations.continuous_batching` "
        "(transformers 5). Switch asynchronous batching and CUDA graphs off.",
    ),
    Mode(
        SERVING,
        "model.generate_batch",
        "note",
        "test_generate_batch_of_the_model_takes_no_processor",
        note="The method silently ignores `logits_processor`. Use `generate_batch` of "
        "`fusion_detox.integrations.continuous_batching` instead.",
    ),
    Mode(
        SERVING,
        'generate(cache_implementation="paged")',
        "refused",
        "test_paged_generation_drops_the_processor",
        note="transformers drops every custom logits processor. Use "
        "`fusion_detox.integrations.continuous_batching` instead.",
    ),
    Mode(
        OTHER,
        "contrastive search, DoLa, diverse and constrained beams",
        "refused",
        "test_strategies_from_the_hub",
        note="transformers 5 moved them to the Hub. It raises an error unless it may run code from "
        "there, which is not tested here.",
    ),
]


def modes_of(test: str) -> list[Mode]:
    """Return the modes that a test function covers."""
    found = [mode for mode in MODES if mode.test == test]
    assert found, f"no mode in modes.py names {test}"
    return found
