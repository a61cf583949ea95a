"""Requests, answers, and the interface of a writer that answers them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from fusion_detox.training.negatives.config import (
    NEGATIVE,
    POSITIVE,
    NegativesConfig,
    PromptTexts,
)

STOP, LENGTH, FILTERED = "stop", "length", "filtered"


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt for the model.

    Attributes:
        sentence: The sentence to paraphrase.
        side: ``"positive"`` or ``"negative"``.
        sample: Number of the request among those of its sentence and side, from 0.
        text: The prompt.
        wanted: How many paraphrases it asks for.
    """

    sentence: str
    side: str
    sample: int
    text: str
    wanted: int = 1

    @property
    def key(self) -> tuple[str, str, int]:
        """Identifies the request, whatever the order of the sentences."""
        return self.sentence, self.side, self.sample

    def seed(self, seed: int) -> int:
        """The request's own random seed in 0..2³¹-1, derived from the run's seed."""
        name = f"{seed}:{self.side}:{self.sample}:{self.sentence}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1


class Answer(NamedTuple):
    """The result of a request.

    Attributes:
        request: The request.
        text: The model's raw answer; empty if the request failed.
        finish: ``"stop"``, ``"length"`` if the answer was cut off, or ``"filtered"`` if the service
            withheld it.
        prompt_tokens: As counted by the writer; ``None`` if it does not report them.
        completion_tokens: Likewise.
        failure: Why there is no answer; empty if there is one.
    """

    request: Request
    text: str = ""
    finish: str = STOP
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    failure: str = ""


Keep = Callable[[Answer], None]


class Writer(Protocol):
    """A language model that answers requests; any object with these methods will do."""

    def record(self) -> dict[str, Any]:
        """What identifies the model, such as its name and revision; JSON-ready, no secrets."""
        ...

    def count_tokens(self, text: str) -> int:
        """The number of tokens of a text, or an estimate."""
        ...

    def answer(
        self, requests: Sequence[Request], config: NegativesConfig, prompts: PromptTexts, keep: Keep
    ) -> None:
        """Answers requests in any order and passes each answer to ``keep`` immediately.

        ``keep`` is called by one thread at a time. If a single request fails, it gets an answer
        with a ``failure``.

        Raises:
            FusionDetoxError: No further request can be answered.
        """
        ...


def requests_for(
    sentences: Sequence[str], config: NegativesConfig, prompts: PromptTexts
) -> list[Request]:
    """All requests for some sentences, sentence by sentence, with alternating sides."""
    found: list[Request] = []
    for sentence in sentences:
        sides = []
        for side, count in ((POSITIVE, config.positives), (NEGATIVE, config.negatives)):
            text = prompts.render(side, sentence, count)
            as_list = prompts.asks_for_list(side)
            times, wanted = (min(count, 1), count) if as_list else (count, 1)
            sides.append([Request(sentence, side, k, text, wanted) for k in range(times)])
        # The sides alternate, so that a service that refuses one of them does not look broken.
        longest = max(map(len, sides))
        found += [side[k] for k in range(longest) for side in sides if k < len(side)]
    return found


def chat_messages(text: str, prompts: PromptTexts) -> list[dict[str, str]]:
    """A prompt as chat messages, after the system message if there is one."""
    system = [{"role": "system", "content": prompts.system}] if prompts.system else []
    return [*system, {"role": "user", "content": text}]
