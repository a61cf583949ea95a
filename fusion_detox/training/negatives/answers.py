"""Extracts the paraphrases from a model's raw answer."""

from __future__ import annotations

import re

from fusion_detox.scoring.refusals import is_refusal, refuses_rewriting
from fusion_detox.training.data.pairs import fold
from fusion_detox.training.negatives.requests import FILTERED, LENGTH

REFUSAL, NOTHING, CUT_OFF = "refusal", "no paraphrase in the answer", "cut off"

_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
# A model without a chat template may continue with further turns of the dialogue.
_NEXT_TURN = re.compile(
    r"\n[^\S\n]*(?:#{2,}\s*\w|(?:human|user|assistant|response|instruction)\s*:)|</s>|<\|",
    re.IGNORECASE,
)
_ITEM = re.compile(
    r"^\s*(?:[-*•–·]\s+|\(?\d{1,2}\s*[.):]\s+|\(?[a-h][.)]\s+|\d{1,2}\s+-\s+)(?P<text>\S.*)$"
)
_SUBJECT = (
    r"(?:paraphras\w*|rephras\w*|reword\w*|rewrit\w*|versions?|sentences?|statements?|answer"
    r"|response|output|result|options?|examples?|toxic|neutral|positive|negative)"
)
# "Sure, here is a very toxic paraphrase of the sentence:", "Paraphrase 2:", "Toxic version:"
_PREAMBLE = re.compile(
    r"^[^\w\s]{0,3}(?:(?:sure|certainly|of course|absolutely|ok(?:ay)?|alright|yes)\b[^:\n]{0,120}"
    rf"|(?:here(?:'s|’s| is| are)|below (?:is|are)|this is|these are)\b[^:\n]{{0,80}}\b{_SUBJECT}\b"
    r"[^:\n]{0,80}"
    rf"|(?:\w+ )?{_SUBJECT}\b[^:\n\"“]{{0,30}}"
    r"|(?:here(?:'s|’s| is| are)|below (?:is|are)) [^:\n]{0,80}(?=:\W{0,2}\n)"
    r")[*_]{0,2}:[*_]{0,2}(?:\s+|$)",
    re.IGNORECASE,
)
_YES = re.compile(
    r"^(?:sure|certainly|of course|absolutely|ok(?:ay)?|alright)(?: thing)?[!,.]+\s*"
    r"(?=[\"“'‘*]|\n|$)",
    re.IGNORECASE,
)
_AFTERWORD = re.compile(
    r"^\W{0,3}(?:(?:please )?note\b\s*(?::|that\b|,)|disclaimer\b|warning\s*:|i hope this\b"
    r"|let me know\b|is there anything\b|these paraphrases\b|this (?:paraphrase|version|sentence)\b"
    r"|(?:please )?(?:keep in mind|remember) that\b|explanation\s*:)",
    re.IGNORECASE,
)
_LONGEST = 1 << 16
"""Characters of an answer that are read. A longer one counts as cut off there."""
_MARKS = ("****", '""', "“”", "''", "‘’", "«»", "``", "**", "__")


def parse_answer(
    text: str, *, sentence: str, wanted: int = 1, finish: str = "stop"
) -> tuple[list[str], str]:
    """Extracts the paraphrases from an answer.

    Removes list markers, quotation marks, labels, polite openings and closing remarks. An answer
    that was cut off loses its last paraphrase.

    Args:
        text: The model's answer.
        sentence: The sentence that it paraphrases.
        wanted: How many paraphrases were requested; no more are returned.
        finish: ``"length"`` if the answer was cut off, ``"filtered"`` if it was withheld.

    Returns:
        The paraphrases and ``""``, or an empty list and the reason: ``REFUSAL``, ``NOTHING`` or
        ``CUT_OFF``.
    """
    if finish == FILTERED:
        return [], REFUSAL
    text = _THOUGHT.sub("", text).strip()
    if len(text) > _LONGEST:
        text, finish = text[:_LONGEST], LENGTH
    if turn := _NEXT_TURN.search("\n" + text):
        text, finish = ("\n" + text)[: turn.start()].strip(), "stop"
    # The paraphrase of a sentence such as "I cannot help with that" is not a refusal.
    if not is_refusal(sentence) and refuses_rewriting(text):
        return [], REFUSAL
    found = _parts(text, whole="\n" in sentence.strip() and wanted == 1)
    if finish == LENGTH:
        found = found[:-1]
        if not found:
            return [], CUT_OFF
    clean = dict.fromkeys(filter(None, (_unwrap(part) for part in found)))
    kept = list(clean)[:wanted]
    return kept, "" if kept else NOTHING


def _parts(text: str, *, whole: bool) -> list[str]:
    text = _YES.sub("", text.replace("```", "").strip()).strip()
    opening = _PREAMBLE.match(text)
    if opening and text[opening.end() :].strip():
        text = text[opening.end() :].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    end = next((k for k, line in enumerate(lines) if k and _AFTERWORD.match(line)), len(lines))
    lines = lines[:end]
    items = [item["text"] for item in map(_ITEM.match, lines) if item]
    if len(items) > 1 or (items and len(items) == len(lines)):
        return items
    return ["\n".join(lines)] if whole and lines else lines


def _unwrap(text: str) -> str:
    """Removes the label and the quotation or emphasis marks around a paraphrase."""
    before = None
    while text != before:
        before, text = text, text.strip()
        label = _PREAMBLE.match(text)
        if label and text[label.end() :].strip():
            text = text[label.end() :]
        text = text.removeprefix("> ")
        for marks in _MARKS:
            half = len(marks) // 2
            left, right, inner = marks[:half], marks[half:], text[half:-half]
            whole = text.startswith(left) and text.endswith(right) and inner
            if whole and left not in inner and right not in inner:
                text = inner
    return text if any(map(str.isalnum, fold(text))) else ""
