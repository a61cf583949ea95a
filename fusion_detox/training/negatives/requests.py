"""Requests, answers, and what a writer of answers is."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from fusion_detox.training.negatives.config import (
    NEGATIVE,
    POSITIVE,
    SIDES,
    NegativesConfig,
    PromptTexts,
)

STOP, LENGTH, FILTERED = "stop", "length", "filtered"


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to the model.

    Attributes:
        sentence: What is to be paraphrased.
        side: ``"positive"`` or ``"negative"``.
        sample: Number of the request among those of its sentence and side.
        text: What the model is asked.
        wanted: How many paraphrases it asks for.
    """

    sentence: str
    side: str
    sample: int
    text: str
    wanted: int = 1

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it apart, whatever the order of the sentences."""
        return self.sentence, self.side, self.sample

    def seed(self, seed: int) -> int:
        """A seed of its own, in 0..2³¹-1."""
        name = f"{seed}:{self.side}:{self.sample}:{self.sentence}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1


class Answer(NamedTuple):
    """What came of a request.

    Attributes:
        request: The request.
        text: The model's raw answer; empty where there is none.
        finish: ``"stop"``, ``"length"`` where it was cut off, ``"filtered"`` where the service
            withheld it.
        prompt_tokens: As the writer counts them; ``None`` where it does not tell.
        completion_tokens: Likewise.
        failure: Why there is no answer; empty where there is one.
    """

    request: Request
    text: str = ""
    finish: str = STOP
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    failure: str = ""


Keep = Callable[[Answer], None]


class Writer(Protocol):
    """A language model that answers requests; anything like this will do."""

    def record(self) -> dict[str, Any]:
        """JSON-ready: what decides an answer beside the sampling; model, revision, no secret."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, or an estimate."""
        ...

    def answer(
        self, requests: Sequence[Request], config: NegativesConfig, prompts: PromptTexts, keep: Keep
    ) -> None:
        """Answers requests in any order, handing each answer over as soon as it is there.

        ``keep`` is called by one thread at a time. A request that fails by itself is handed over
        with its ``failure``.

        Raises:
            FusionDetoxError: No further request can be answered.
        """
        ...


def requests_for(
    sentences: Sequence[str], config: NegativesConfig, prompts: PromptTexts
) -> list[Request]:
    """All requests of some sentences, sentence by sentence, both sides of each in turn."""
    found: list[Request] = []
    for sentence in sentences:
        sides = []
        for side in SIDES:
            count = {POSITIVE: config.positives, NEGATIVE: config.negatives}[side]
            text = prompts.render(side, sentence, count)
            times, wanted = (min(count, 1), count) if prompts.in_one(side) else (count, 1)
            sides.append([Request(sentence, side, k, text, wanted) for k in range(times)])
        # In turn, so that a service that refuses one side is not taken for one that is broken.
        longest = max(map(len, sides))
        found += [side[k] for k in range(longest) for side in sides if k < len(side)]
    return found
