"""Paraphrases are found in whatever form a model answers; near-duplicates are told apart."""

import itertools
import random

import pytest

from fusion_detox.scoring.refusals import refuses_rewriting
from fusion_detox.training.negatives.answers import CUT_OFF, NOTHING, REFUSAL, parse_answer
from fusion_detox.training.negatives.near_duplicates import NearDuplicates, normalised

SENTENCE = "The new library opens on Monday."
ONE = ["The library starts on Monday."]


@pytest.mark.parametrize(
    "text",
    [
        "The library starts on Monday.",
        '"The library starts on Monday."',
        "  “The library starts on Monday.”\n",
        "**The library starts on Monday.**",
        "> The library starts on Monday.",
        'Sure, here is a paraphrase of the sentence:\n\n"The library starts on Monday."',
        "Sure! Here's a very toxic version: 'The library starts on Monday.'",
        'Certainly! "The library starts on Monday."',
        "Paraphrase: The library starts on Monday.",
        "**Toxic version:** The library starts on Monday.",
        "The library starts on Monday.\n\nNote: I kept the meaning.",
        "The library starts on Monday.\n\nI hope this helps!",
        "1. The library starts on Monday.",
        "<think>The user wants\n1. this\n2. that</think>The library starts on Monday.",
        "The library starts on Monday.\n\n### HUMAN: Paraphrase the following",
        "```\nThe library starts on Monday.\n```",
    ],
)
def test_one_paraphrase_in_many_dresses(text):
    assert parse_answer(text, sentence=SENTENCE) == (ONE, "")


@pytest.mark.parametrize(
    "text",
    [
        "1. It opens.\n2. It starts.\n3. It begins.",
        "1) It opens.\n2) It starts.\n\n3) It begins.",
        '- "It opens."\n- "It starts."\n- "It begins."\n\nLet me know if you need more!',
        "Here are three paraphrases:\n* It opens.\n* It starts.\n* It begins.",
        "Here are some:\n\n1. It opens.\n2. It starts.\n3. It begins.",
        "It opens.\nIt starts.\n\nIt begins.",
        "Option 1: It opens.\nOption 2: It starts.\nOption 3: It begins.",
        "1. It opens.\n2. It opens.\n3. It starts.\n4. It begins.",
    ],
)
def test_lists(text):
    found, reason = parse_answer(text, sentence=SENTENCE, wanted=3)
    assert (found, reason) == (["It opens.", "It starts.", "It begins."], "")
    assert parse_answer(text, sentence=SENTENCE, wanted=2)[0] == found[:2]


@pytest.mark.parametrize(
    "text",
    [
        "Here is the thing: it opens on Monday.",
        "You fools: it opens on Monday.",
        "Okay, so it opens on Monday.",
        "'Don't go,' he said.",
        'He called it "a dump" and left.',
        "In 1987. the town built it.",
        "I can't believe that it opens on Monday.",
        "Noted authors come to the opening.",
    ],
)
def test_what_only_looks_like_dress_stays(text):
    assert parse_answer(text, sentence=SENTENCE) == ([text], "")


def test_a_sentence_of_several_lines_keeps_them():
    text = "First line.\nSecond line."
    assert parse_answer(text, sentence="a\nb") == ([text], "")


def test_answers_that_are_cut_off_lose_their_end():
    assert parse_answer("It opens on", sentence=SENTENCE, finish="length") == ([], CUT_OFF)
    found = parse_answer("1. A one\n2. A tw", sentence=SENTENCE, wanted=2, finish="length")
    assert found == (["A one"], "")
    # What follows the next turn was cut off, not the answer.
    text = "It opens.\n### HUMAN: Para"
    assert parse_answer(text, sentence=SENTENCE, finish="length") == (["It opens."], "")


@pytest.mark.parametrize("text", ["", "  \n", "!!!", "<think>never ends", "```\n```"])
def test_nothing_is_there(text):
    assert parse_answer(text, sentence=SENTENCE) == ([], NOTHING)


REFUSALS = [
    "I'm sorry, but I can't help with that request.",
    "I can’t rephrase that in a toxic way.",
    "I cannot provide a toxic paraphrase of this sentence.",
    "Sorry, I won't use slurs.",
    "As an AI language model, I cannot write hateful content.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert parse_answer(text, sentence=SENTENCE) == ([], REFUSAL)
    # A paraphrase of a refusal is none.
    said = "I'm sorry, but I cannot assist with that."
    assert parse_answer("I am afraid I can't help with that.", sentence=said)[1] == ""


def test_what_the_service_withheld_is_a_refusal():
    assert parse_answer("some text", sentence=SENTENCE, finish="filtered") == ([], REFUSAL)


@pytest.mark.parametrize(
    "text", ["I can't use this car any longer.", "I will not give you money.", "You write badly."]
)
def test_prose_is_no_refusal(text):
    assert not refuses_rewriting(text)


def reference_jaccard(one, other):
    one, other = (
        {text[k : k + 5] for k in range(max(len(text) - 5, 0) + 1)} for text in (one, other)
    )
    return len(one & other) / len(one | other)


def test_near_duplicates_are_those_of_a_plain_comparison_of_all_pairs():
    generator = random.Random(0)
    words = ["red", "green", "house", "tree", "river", "stone", "bird", "cloud", "night"]
    texts = []
    for _ in range(150):
        base = [generator.choice(words) for _ in range(12)]
        texts.append(" ".join(base))
        for _ in range(generator.randrange(3)):
            base[generator.randrange(12)] = generator.choice(words)
            texts.append(" ".join(base))
    index, kept, dropped = NearDuplicates(0.7), [], 0
    for text in texts:
        expected = any(reference_jaccard(text, other) >= 0.7 for other in kept)
        assert index.near(text) == expected
        if not expected:
            index.add(text)
            kept.append(text)
        dropped += expected
    assert dropped > 50
    assert max(reference_jaccard(a, b) for a, b in itertools.combinations(kept, 2)) < 0.7


def test_capitals_and_punctuation_make_no_other_text():
    index = NearDuplicates(None)
    index.add("You, IDIOT! Go.")
    assert index.equal("you idiot: go")
    assert not index.equal("you idiots go")
    assert not index.near("you idiots go"), "without a threshold only equal texts are one"
    assert normalised("?!") == "?!"
    for short in ("a", "", "?"):  # shorter than a 5-gram
        index = NearDuplicates(0.9)
        index.add(short)
        assert index.near(short)
        assert not index.near("other")
