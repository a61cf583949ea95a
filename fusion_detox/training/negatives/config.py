"""Settings of ``make_negatives``: how many paraphrases, the prompts, sampling, and filters."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from fusion_detox.config import check_settings, setting
from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.files.untrusted import read_json

POSITIVE, NEGATIVE = "positive", "negative"
SIDES = (POSITIVE, NEGATIVE)


@dataclasses.dataclass(frozen=True)
class NegativesConfig:
    """Settings of ``make_negatives``; each field's help text is also the command line's.

    Temperature, top-k and length are those of the authors' code for arXiv 2401.08491.
    """

    negatives: int = setting(8, "Requests", "toxic paraphrases to request per sentence", 1, 1000)
    positives: int = setting(
        5,
        "Requests",
        "neutral paraphrases to request per sentence; with 0, only the sentence itself is used",
        0,
        1000,
    )
    temperature: float = setting(1.0, "Requests", "sampling temperature", 0.01, 10)
    top_p: float = setting(0.95, "Requests", "probability mass to sample from", 0.01, 1)
    top_k: int = setting(
        25, "Requests", "number of tokens to sample from, 0 for all; local models only", 0
    )
    max_new_tokens: int = setting(150, "Requests", "maximum tokens per answer", 1)
    seed: int = setting(
        0, "Requests", "random seed; each request's seed also depends on its sentence and number", 0
    )
    toxic_from: float = setting(0.5, "Thresholds", "minimum toxicity score of a negative", 0, 1)
    clean_to: float = setting(0.3, "Thresholds", "maximum toxicity score of a positive", 0, 1)
    min_similarity: float | None = setting(
        0.5,
        "Thresholds",
        "minimum cosine similarity to the sentence's embedding; none disables this filter",
        -1,
        1,
    )
    max_length_ratio: float | None = setting(
        2.5,
        "Thresholds",
        "maximum ratio between the lengths of paraphrase and sentence; none disables this filter",
        1,
    )
    max_nll_gap: float | None = setting(
        0.5,
        "Thresholds",
        "maximum difference from the sentence's negative log-likelihood in nats per byte, under "
        "--closeness-model; none disables this filter",
        0,
        aliases=("--max-closeness",),
    )
    min_positives: int = setting(1, "Thresholds", "omit sentences with fewer positives", 1)
    min_negatives: int = setting(1, "Thresholds", "omit sentences with fewer negatives", 1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.clean_to >= self.toxic_from:
            raise ConfigError(
                f"clean_to is {self.clean_to:g} and toxic_from is {self.toxic_from:g}, so a text "
                "could be both; clean_to must be below toxic_from"
            )
        # The sentence itself can be one of the positives.
        for minimum, count, extra in (
            ("min_positives", "positives", 1),
            ("min_negatives", "negatives", 0),
        ):
            needed, requested = getattr(self, minimum), getattr(self, count)
            if needed > requested + extra:
                raise ConfigError(
                    f"{minimum} is {needed}, but {count} is only {requested}; raise {count} or "
                    f"lower {minimum}"
                )

    def sampling(self) -> dict[str, Any]:
        """The settings that influence an individual answer."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def thresholds(self) -> dict[str, Any]:
        """The settings of the filters, under the names that files use."""
        fields = dataclasses.fields(self)
        kept = {
            f.name: getattr(self, f.name) for f in fields if f.metadata["group"] == "Thresholds"
        }
        kept["max_closeness"] = kept.pop("max_nll_gap")
        return kept


@dataclasses.dataclass(frozen=True)
class PromptTexts:
    """The prompts for the model; the defaults are the wording of arXiv 2401.08491.

    ``{sentence}`` is replaced by the sentence. If ``{n}`` occurs, one request asks for a list of
    all paraphrases of its side; otherwise each request asks for one, as in the paper.

    Attributes:
        positive: Asks for a neutral paraphrase.
        negative: Asks for a toxic paraphrase.
        system: System message; an empty one is not sent.
        frame: Surrounds ``{request}`` if a local model has no chat template.
    """

    positive: str = 'Paraphrase the following sentences:\n"{sentence}"'
    negative: str = (
        "Paraphrase the following sentence in a very toxic way. Make sure each sentence is toxic:\n"
        '"{sentence}"'
    )
    system: str = ""
    frame: str = "### HUMAN: {request}\n\n### RESPONSE:\n"

    def __post_init__(self) -> None:
        placeholders = {POSITIVE: "{sentence}", NEGATIVE: "{sentence}", "frame": "{request}"}
        for name, placeholder in placeholders.items():
            text = getattr(self, name)
            if placeholder not in text:
                raise ConfigError(f"the prompt {name!r} must contain {placeholder}: {text!r}")

    @classmethod
    def from_file(cls, path: str | Path) -> PromptTexts:
        """Reads a JSON object with some of the fields; the others keep their defaults.

        Raises:
            DataFileError: The file cannot be read.
            DataError: It is not a JSON object of texts, or it has an unknown field.
            ConfigError: A prompt lacks its placeholder.
        """
        try:
            found = read_json(Path(path))
        except OSError as error:
            raise DataFileError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        known = ", ".join(field.name for field in dataclasses.fields(cls))
        if not isinstance(found, dict):
            raise DataError(f"{path} must contain one JSON object with some of {known}")
        for name, value in found.items():
            if name not in known.split(", "):
                raise DataError(f"{path} has an unknown field {name!r}; the known ones are {known}")
            if not isinstance(value, str):
                raise DataError(f"{path}: {name} must be a string, but is {value!r}")
        return cls(**found)

    def asks_for_list(self, side: str) -> bool:
        """Whether one request asks for all paraphrases of a side."""
        return "{n}" in getattr(self, side)

    def render(self, side: str, sentence: str, count: int) -> str:
        """The prompt for a sentence; placeholders inside the sentence are left alone."""
        values = {"{sentence}": sentence, "{n}": str(count)}
        return re.sub(r"\{sentence\}|\{n\}", lambda mark: values[mark.group()], getattr(self, side))
