"""A run's expected cost, and the outcome of its requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_detox.config import check_number
from fusion_detox.training.negatives.config import NegativesConfig
from fusion_detox.training.negatives.requests import Request, Writer

# An answer is about as long as its sentence, plus some polite words.
_ANSWER_TO_SENTENCE, _EXTRA_TOKENS = 1.3, 8
_COUNTED = 200


@dataclasses.dataclass(frozen=True)
class Prices:
    """Prices per million tokens, in any currency; ``None`` if unknown."""

    prompt: float | None = None
    completion: float | None = None

    def __post_init__(self) -> None:
        for name, price in dataclasses.asdict(self).items():
            if price is not None:
                check_number(f"the price of {name} tokens", price, 0)

    def of(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """The price of some tokens; ``None`` if no price is known."""
        if self.prompt is None and self.completion is None:
            return None
        total = prompt_tokens * (self.prompt or 0) + completion_tokens * (self.completion or 0)
        return total / 1e6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated cost of the requests that are still to be sent.

    Attributes:
        requests: Number of requests.
        prompt_tokens: Estimated sum.
        completion_tokens: Estimated sum, if answers are about as long as their sentences.
        most_completion_tokens: The sum if every answer has the maximum length.
        price: Estimated price; ``None`` if no price was given.
        most_price: The price with ``most_completion_tokens``.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int
    price: float | None
    most_price: float | None


def estimate(
    requests: Sequence[Request], writer: Writer, config: NegativesConfig, prices: Prices
) -> Estimate:
    """Estimates tokens and price from an evenly spaced sample of the requests."""
    sample = requests[:: max(1, len(requests) // _COUNTED)]
    scale = len(requests) / max(len(sample), 1)
    prompt = scale * sum(writer.count_tokens(request.text) for request in sample)
    completion = scale * sum(
        min(
            (writer.count_tokens(request.sentence) * _ANSWER_TO_SENTENCE + _EXTRA_TOKENS)
            * request.wanted,
            config.max_new_tokens,
        )
        for request in sample
    )
    most = len(requests) * config.max_new_tokens
    return Estimate(
        requests=len(requests),
        prompt_tokens=round(prompt),
        completion_tokens=round(completion),
        most_completion_tokens=most,
        price=prices.of(prompt, completion),
        most_price=prices.of(prompt, most),
    )


@dataclasses.dataclass(frozen=True)
class NegativesReport:
    """The outcome of a run.

    Attributes:
        out: The file of pairs.
        answers: The file of raw answers.
        sentences: Number of distinct sentences.
        requests: Number of requests they need.
        answered: Requests with an answer, including those of earlier runs.
        failed: Requests that failed; the same command sends them again.
        unasked: Requests that no run has sent yet.
        failed_sentences: Sentences with a failed request.
        failures: Number of failed requests by reason.
        pairs: Number of paraphrase sets that were kept.
        positives: Number of non-toxic texts in them.
        negatives: Number of toxic texts in them.
        dropped: Number of dropped paraphrases by side and reason.
        without_pair: Number of sentences without a set by reason.
        prompt_tokens: Sum over all answers, as counted by the writer.
        completion_tokens: Likewise.
        price: Price of all answers; ``None`` if no price or no token count is known.
        planned: The estimate for this run's requests; ``None`` if it only filtered.
        stopped: Why the run stopped early; empty if it did not.
    """

    out: str
    answers: str
    sentences: int
    requests: int
    answered: int
    failed: int
    unasked: int
    failed_sentences: int
    failures: Mapping[str, int]
    pairs: int
    positives: int
    negatives: int
    dropped: Mapping[str, Mapping[str, int]]
    without_pair: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    price: float | None
    planned: Estimate | None
    stopped: str

    @property
    def complete(self) -> bool:
        """Whether every request has an answer."""
        return not (self.failed or self.unasked or self.stopped)

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``complete``, JSON-ready."""
        return {**dataclasses.asdict(self), "complete": self.complete}
