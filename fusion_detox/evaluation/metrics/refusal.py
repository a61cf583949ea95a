"""Does a model refuse to go on? Fusion should not teach a target to refuse harmless prompts.

What counts as a refusal is told in ``fusion_detox.scoring.refusals``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion_detox.evaluation.metrics.statistics import Interval, Resamples, mean_interval
from fusion_detox.scoring.refusals import is_refusal

__all__ = ["is_refusal", "refusal", "refusal_rate"]


def refusal_rate(samples: Sequence[Sequence[str]], draws: Resamples) -> Interval:
    """Share of a prompt's samples that refuse, the mean over prompts, with its interval.

    Args:
        samples: The continuations of each prompt; an empty one is no refusal. A prompt without
            samples is left out.
        draws: Resamples of as many prompts.
    """
    shares = [
        sum(map(is_refusal, texts)) / len(texts) if texts else float("nan") for texts in samples
    ]
    return mean_interval(shares, draws)


def refusal(suite: str, samples: Sequence[Sequence[str]], draws: Resamples) -> dict[str, Any]:
    """Refusals of a suite of prompts, as ``results.json`` holds them."""
    return {"suite": suite, "prompts": len(samples), "rate": refusal_rate(samples, draws)}
