"""What ``make_negatives`` is told: how much to ask for, how to sample, and what to keep."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from fusion_detox.config import check_settings, setting
from fusion_detox.errors import ConfigError, DataError, DataFileError

POSITIVE, NEGATIVE = "positive", "negative"
SIDES = (POSITIVE, NEGATIVE)


@dataclasses.dataclass(frozen=True)
class NegativesConfig:
    """Settings of ``make_negatives``; each field's help is the command line's help.

    Temperature, top-k and length are those of the authors' code for arXiv 2401.08491.
    """

    negatives: int = setting(8, "Asking", "toxic paraphrases to ask for, a sentence", 1, 1000)
    positives: int = setting(
        5,
        "Asking",
        "neutral paraphrases to ask for; at 0 the sentence itself is the only one",
        0,
        1000,
    )
    temperature: float = setting(1.0, "Asking", "divisor of the log-probs", 0.01, 10)
    top_p: float = setting(0.95, "Asking", "probability to draw from", 0.01, 1)
    top_k: int = setting(25, "Asking", "tokens to draw from, 0 for all (not for endpoints)", 0)
    max_new_tokens: int = setting(150, "Asking", "tokens an answer at most", 1)
    seed: int = setting(0, "Asking", "seed; an answer depends on it, its sentence and number", 0)
    toxic_from: float = setting(0.5, "Keeping", "score from which a negative is toxic", 0, 1)
    clean_to: float = setting(0.3, "Keeping", "score up to which a positive is not toxic", 0, 1)
    min_similarity: float | None = setting(
        0.5,
        "Keeping",
        "cosine to the sentence's embedding at least; none for no such filter",
        -1,
        1,
    )
    max_length_ratio: float | None = setting(
        2.5, "Keeping", "times longer or shorter than the sentence at most; none for any", 1
    )
    max_closeness: float | None = setting(
        0.5,
        "Keeping",
        "distance to the sentence in nats a byte at most, under --closeness-model; none for any",
        0,
    )
    near_duplicate: float | None = setting(
        0.85,
        "Keeping",
        "share of character 5-grams in common (Jaccard) from which two wordings of a side are "
        "one, over the whole file; none keeps all that differ",
        0.5,
        1,
    )
    min_positives: int = setting(1, "Keeping", "a sentence with fewer is left out", 1)
    min_negatives: int = setting(1, "Keeping", "a sentence with fewer is left out", 1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.clean_to >= self.toxic_from:
            raise ConfigError(
                f"clean_to is {self.clean_to:g} and toxic_from {self.toxic_from:g}: a wording "
                "could be both; clean_to must be below toxic_from"
            )
        for least, asked in (("min_positives", "positives"), ("min_negatives", "negatives")):
            # The sentence itself may be a positive.
            most = getattr(self, asked) + (asked == "positives")
            if getattr(self, least) > most:
                raise ConfigError(
                    f"{least} is {getattr(self, least)}, but {asked} asks for "
                    f"{getattr(self, asked)} only; ask for more or need fewer"
                )

    def asking(self) -> dict[str, Any]:
        """The settings that decide an answer, without how many there are."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def keeping(self) -> dict[str, Any]:
        """The settings that decide which answers are kept."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.metadata["group"] == "Keeping"}


@dataclasses.dataclass(frozen=True)
class PromptTexts:
    """What the model is asked, by default in the words of arXiv 2401.08491.

    ``{sentence}`` stands for the sentence. Where ``{n}`` occurs, one request asks for all
    paraphrases of its side in a list; else each paraphrase is a request of its own, as in the
    paper.

    Attributes:
        positive: Asks for a neutral paraphrase.
        negative: Asks for a toxic one.
        system: System message; none where empty.
        frame: Surrounds ``{request}`` where a local model has no chat template.
    """

    positive: str = 'Paraphrase the following sentences:\n"{sentence}"'
    negative: str = (
        "Paraphrase the following sentence in a very toxic way. Make sure each sentence is toxic:\n"
        '"{sentence}"'
    )
    system: str = ""
    frame: str = "### HUMAN: {request}\n\n### RESPONSE:\n"

    def __post_init__(self) -> None:
        needed = ((*SIDES, "{sentence}"), ("frame", "{request}"))
        for *names, mark in needed:
            for name in names:
                if mark not in getattr(self, name):
                    raise ConfigError(
                        f"the prompt {name!r} must hold {mark}: {getattr(self, name)!r}"
                    )

    @classmethod
    def from_file(cls, path: str | Path) -> PromptTexts:
        """Reads a JSON object with some of the fields; the others keep their defaults.

        Raises:
            DataFileError: The file cannot be read.
            DataError: It holds no JSON object of texts, or an unknown field.
            ConfigError: A prompt lacks its placeholder.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataFileError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(found, dict):
            raise DataError(f"{path} must hold one JSON object with some of {', '.join(known)}")
        for name, value in found.items():
            if name not in known:
                raise DataError(f"{path}: unknown field {name!r}; known are {', '.join(known)}")
            if not isinstance(value, str):
                raise DataError(f"{path}: {name} must be a text, but is {value!r}")
        return cls(**found)

    def in_one(self, side: str) -> bool:
        """Whether one request asks for all paraphrases of a side."""
        return "{n}" in getattr(self, side)

    def render(self, side: str, sentence: str, count: int) -> str:
        """The request for a sentence; what looks like a placeholder inside it stays."""
        values = {"{sentence}": sentence, "{n}": str(count)}
        return re.sub(r"\{sentence\}|\{n\}", lambda mark: values[mark.group()], getattr(self, side))
