"""What a run will cost, before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fusion_detox.errors import ConfigError
from fusion_detox.training.negatives.config import NegativesConfig
from fusion_detox.training.negatives.requests import Request, Writer

# An answer is about as long as its sentence, with some politeness around it.
_LONGER, _AROUND = 1.3, 8
_COUNTED = 200


@dataclasses.dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency; ``None`` where not known."""

    prompt: float | None = None
    completion: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"the price of {name} tokens must be at least 0, but is {value}")

    def of(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """What so many tokens cost; ``None`` where no price is known."""
        if self.prompt is None and self.completion is None:
            return None
        total = prompt_tokens * (self.prompt or 0) + completion_tokens * (self.completion or 0)
        return total / 1e6


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is still to be asked.

    Attributes:
        requests: How many.
        prompt_tokens: Estimated sum.
        completion_tokens: Estimated sum, of answers as long as their sentences.
        most_completion_tokens: If every answer were as long as is allowed.
        price: Estimated; ``None`` where no price was given.
        most_price: With ``most_completion_tokens``.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int
    price: float | None
    most_price: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready."""
        return dataclasses.asdict(self)


def estimate(
    requests: Sequence[Request], writer: Writer, config: NegativesConfig, prices: Prices
) -> Estimate:
    """Estimates tokens and price of some requests, from every so-manieth of them."""
    step = max(1, len(requests) // _COUNTED)
    seen = requests[::step]
    scale = len(requests) / max(len(seen), 1)
    asked = sum(writer.count_tokens(request.text) for request in seen) * scale
    answered = scale * sum(
        min(
            (writer.count_tokens(request.sentence) * _LONGER + _AROUND) * request.wanted,
            config.max_new_tokens,
        )
        for request in seen
    )
    most = len(requests) * config.max_new_tokens
    return Estimate(
        len(requests),
        round(asked),
        round(answered),
        most,
        prices.of(asked, answered),
        prices.of(asked, most),
    )
