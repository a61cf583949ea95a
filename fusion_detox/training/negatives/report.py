"""What a run asked, kept and dropped."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_detox.training.negatives.cost import Estimate, Prices
from fusion_detox.training.negatives.filters import Filters
from fusion_detox.training.negatives.requests import Answer, Request

NO_ANSWER = "no answer"


@dataclasses.dataclass(frozen=True)
class NegativesReport:
    """What became of the sentences.

    Attributes:
        out: The file of pairs.
        answers: The file of raw answers.
        sentences: How many different ones there are.
        requests: How many they need.
        answered: Requests with an answer, those of earlier runs among them.
        failed: Requests that failed; the same command asks them again.
        unasked: Requests that no run has come to yet.
        failed_sentences: Sentences with a failed request.
        failures: How many requests failed for which reason.
        pairs: Paraphrase sets that were kept.
        positives: Non-toxic wordings in them.
        negatives: Toxic wordings in them.
        dropped: Of each side, how many paraphrases were dropped for which reason.
        without_pair: How many sentences gave no set for which reason.
        prompt_tokens: Of all answers, as the writer counted them.
        completion_tokens: Likewise.
        price: Of all answers; ``None`` where no price or no count is known.
        planned: The estimate of what this run had to ask; ``None`` where it only filtered.
        stopped: Why the asking ended early; empty where it did not.
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


def make_report(
    paths: tuple[str, str],
    requests: Sequence[Request],
    answers: Sequence[Answer | None],
    *,
    filters: Filters | None = None,
    unanswered: int = 0,
    pairs: int = 0,
    prices: Prices,
    planned: Estimate | None = None,
    stopped: str = "",
) -> NegativesReport:
    """Adds everything up.

    Args:
        paths: Of the output and of the raw answers.
        requests: All of them.
        answers: What came of each.
        filters: After judging; ``None`` where nothing was judged.
        unanswered: Sentences without any answer.
        pairs: Sets that were kept.
        prices: Of tokens.
        planned: The estimate.
        stopped: Why the asking ended early.
    """
    failed = [answer for answer in answers if answer is not None and answer.failure]
    good = [answer for answer in answers if answer is not None and not answer.failure]
    # A service that does not count leaves the sums at what is known.
    asked, written = (
        sum(getattr(answer, name) or 0 for answer in good)
        for name in ("prompt_tokens", "completion_tokens")
    )
    without = Counter(filters.without_pair if filters else {})
    if unanswered and filters:
        without[NO_ANSWER] += unanswered
    return NegativesReport(
        out=paths[0],
        answers=paths[1],
        sentences=len({request.sentence for request in requests}),
        requests=len(requests),
        answered=len(good),
        failed=len(failed),
        unasked=len(requests) - len(good) - len(failed),
        failed_sentences=len({answer.request.sentence for answer in failed}),
        failures=dict(Counter(answer.failure for answer in failed).most_common()),
        pairs=pairs,
        positives=filters.kept["positive"] if filters else 0,
        negatives=filters.kept["negative"] if filters else 0,
        dropped={side: dict(counts.most_common()) for side, counts in filters.dropped.items()}
        if filters
        else {},
        without_pair=dict(without.most_common()),
        prompt_tokens=asked,
        completion_tokens=written,
        price=prices.of(asked, written) if asked or written else None,
        planned=planned,
        stopped=stopped,
    )
