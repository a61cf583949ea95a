"""Paraphrases are extracted from answers in many forms; duplicates are recognised."""

import pytest

from fusion_detox.scoring.refusals import refuses_rewriting
from fusion_detox.training.negatives.answers import CUT_OFF, NOTHING, REFUSAL, parse_answer
from fusion_detox.training.negatives.filters import normalised

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
def test_one_paraphrase_in_many_forms(text):
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
def test_text_that_only_resembles_a_label_is_kept(text):
    assert parse_answer(text, sentence=SENTENCE) == ([text], "")


def test_a_sentence_of_several_lines_keeps_them():
    text = "First line.\nSecond line."
    assert parse_answer(text, sentence="a\nb") == ([text], "")


def test_a_cut_off_answer_loses_its_last_paraphrase():
    assert parse_answer("It opens on", sentence=SENTENCE, finish="length") == ([], CUT_OFF)
    found = parse_answer("1. A one\n2. A tw", sentence=SENTENCE, wanted=2, finish="length")
    assert found == (["A one"], "")
    # The invented next turn was cut off, not the answer.
    text = "It opens.\n### HUMAN: Para"
    assert parse_answer(text, sentence=SENTENCE, finish="length") == (["It opens."], "")


@pytest.mark.parametrize("text", ["", "  \n", "!!!", "<think>never ends", "```\n```"])
def test_answers_without_a_paraphrase(text):
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
    # The paraphrase of a refusal is not a refusal.
    said = "I'm sorry, but I cannot assist with that."
    assert parse_answer("I am afraid I can't help with that.", sentence=said)[1] == ""


def test_a_withheld_answer_is_a_refusal():
    assert parse_answer("some text", sentence=SENTENCE, finish="filtered") == ([], REFUSAL)


@pytest.mark.parametrize(
    "text", ["I can't use this car any longer.", "I will not give you money.", "You write badly."]
)
def test_prose_is_not_a_refusal(text):
    assert not refuses_rewriting(text)


def test_capitals_and_punctuation_do_not_matter_for_duplicates():
    assert normalised("You, IDIOT! Go.") == normalised("you idiot: go")
    assert normalised("you idiots go") != normalised("you idiot go")
    assert normalised("?!") == "?!"
    for short in ("a", "", "?"):
        assert normalised(short) == short
