"""Finds a classifier's toxic labels, and names its labels consistently."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fusion_detox.errors import ConfigError, ModelError
from fusion_detox.scoring.base import TOXICITY

# One name per type, as in the Perspective API and in current Detoxify.
_SAME = {
    "toxic": TOXICITY,
    "severe_toxic": "severe_toxicity",
    "identity_hate": "identity_attack",
    "hatespeech": "hate_speech",
}
_MAIN = {"hate", "hateful", "hate_speech", "offensive", "offensive_language", "abusive", "abuse"}
_KINDS = {"severe_toxicity", "identity_attack", "obscene", "insult", "threat", "profanity"}
_TOXIC = {TOXICITY, *_MAIN, *_KINDS}
# A negation, such as "non_toxic", always means "not toxic".
_NOT = re.compile(r"(?:non|not|no|un)_?(.+)")
# These mean "not toxic" only beside toxic labels, since sentiment models have "neutral", too.
_HARMLESS = {"neutral", "normal", "neither", "none", "clean", "safe", "ok", "benign", "harmless"}


@dataclass(frozen=True)
class ToxicLabels:
    """How to compute toxicity from a classifier's probabilities.

    Attributes:
        indices: The labels that are read.
        inverted: Whether they mean *not* toxic.
        rule: The formula, for the record.
    """

    indices: tuple[int, ...]
    inverted: bool
    rule: str


def type_name(label: str) -> str:
    """A label in snake case; different spellings of a type get one name.

    >>> type_name("Severe Toxic"), type_name("nonHate"), type_name("LABEL_1")
    ('severe_toxicity', 'non_hate', 'label_1')
    """
    snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", label.strip())
    snake = re.sub(r"[\W_]+", "_", snake).strip("_").lower()
    return _SAME.get(snake, snake) or "unnamed"


def is_harmless(label: str) -> bool:
    """Whether a label means not toxic, such as ``neutral`` or ``not_hate``."""
    return type_name(label) in _HARMLESS or _negated(label)


def is_multi_label(labels: Sequence[str], problem_type: str | None, source: str) -> bool:
    """Whether labels are independent (sigmoid) rather than exclusive (softmax).

    Without ``problem_type``, one label means sigmoid and several mean softmax, as in transformers.
    The exception is several types of toxicity without a harmless label: they are independent.

    Raises:
        ModelError: The model was trained for regression.
    """
    if problem_type == "regression":
        raise ModelError(
            f"{source} was trained for regression, so its outputs are not probabilities; give a "
            "classifier"
        )
    if problem_type is not None:
        return problem_type == "multi_label_classification"
    names = {type_name(label) for label in labels}
    kinds = len(labels) > 2 and TOXICITY in names and not any(map(is_harmless, labels))
    return len(labels) == 1 or kinds


def find_toxic(
    labels: Sequence[str], *, multi_label: bool, wanted: str | None, source: str
) -> ToxicLabels:
    """Finds the labels that make up the main score.

    Args:
        labels: The model's labels, in order.
        multi_label: Whether labels are independent.
        wanted: The user's choice: one label, or several separated by commas.
        source: The model's name, for messages.

    Raises:
        ConfigError: ``wanted`` is not a label, or it is unclear which labels mean toxic.
    """
    if wanted is not None:
        return _rule(labels, _chosen(labels, wanted, source), multi_label)
    names = [type_name(label) for label in labels]
    if len(labels) == 2 and not multi_label and names == ["label_0", "label_1"]:
        return _rule(labels, [1], multi_label)
    toxic = [index for index, name in enumerate(names) if name in _TOXIC]
    if multi_label and TOXICITY in names:
        toxic = [names.index(TOXICITY)]
    if toxic and (not multi_label or len(toxic) == 1):
        return _rule(labels, toxic, multi_label)
    negated = [index for index, label in enumerate(labels) if _negated(label)]
    if not negated and len(labels) == 1 and is_harmless(labels[0]):
        negated = [0]
    if len(negated) == 1 and not toxic:
        return ToxicLabels((negated[0],), True, f"1 - p({labels[negated[0]]})")
    raise ConfigError(
        f"It is unclear which labels of {source} mean toxic: {', '.join(labels)}. Name the label "
        "with label= (on the command line classifier:MODEL#LABEL); separate several with commas."
    )


def _chosen(labels: Sequence[str], wanted: str, source: str) -> list[int]:
    whole = [index for index, label in enumerate(labels) if label == wanted]
    if whole:
        return whole
    indices = []
    for part in (piece.strip() for piece in wanted.split(",")):
        found = [i for i, label in enumerate(labels) if label == part] or [
            i for i, label in enumerate(labels) if type_name(label) == type_name(part)
        ]
        if not part or not found:
            raise ConfigError(f"{source} has no label {part!r}; it has: {', '.join(labels)}")
        indices += found
    return list(dict.fromkeys(indices))


def _rule(labels: Sequence[str], indices: Sequence[int], multi_label: bool) -> ToxicLabels:
    terms = [f"p({labels[index]})" for index in indices]
    if len(terms) == 1:
        return ToxicLabels(tuple(indices), False, terms[0])
    # Probabilities of exclusive labels add up; for independent labels, the largest one counts.
    rule = f"max({', '.join(terms)})" if multi_label else " + ".join(terms)
    return ToxicLabels(tuple(indices), False, rule)


def _negated(label: str) -> bool:
    found = _NOT.fullmatch(type_name(label))
    return found is not None and _SAME.get(found.group(1), found.group(1)) in _TOXIC
