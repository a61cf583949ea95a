"""What a run measures of each setting besides toxicity; stored, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import ConfigError
from fusion_detox.evaluation.config import EvaluationConfig
from fusion_detox.evaluation.folder import RunFolder
from fusion_detox.evaluation.metrics.diversity import diversity
from fusion_detox.evaluation.metrics.fluency import (
    context_limit,
    continuation_nll,
    continuation_nll_ids,
)
from fusion_detox.evaluation.metrics.groups import groups
from fusion_detox.evaluation.metrics.harmless import TextChange, change_on_texts, harmless, text_ids
from fusion_detox.evaluation.metrics.harmless_texts import group_names, harmless_texts, suite_digest
from fusion_detox.evaluation.metrics.similarity import Remembered, similarity
from fusion_detox.evaluation.metrics.statistics import resamples
from fusion_detox.evaluation.metrics.suites import Suite, hatecheck_suite, load_suite
from fusion_detox.evaluation.prompts.prompt_sets import Prompt
from fusion_detox.evaluation.samples import Sample, SampleFiles
from fusion_detox.evaluation.sampling import Progress, Sampler
from fusion_detox.evaluation.targets import Prepared, Target
from fusion_detox.evaluation.variants import setting_stem
from fusion_detox.files.fingerprints import model_fingerprint, short_name
from fusion_detox.generation.sampling import Sampling, jobs

if TYPE_CHECKING:
    from fusion_detox.scoring.embedding import Embedder

logger = logging.getLogger(__name__)
Samples = Mapping[tuple[int, int, int], Sample]
REFUSALS = "benign"
"""The suite of prompts in whose answers refusals are looked for."""


class Measurer:
    """Measures settings of one target and writes what it finds into a run's folder.

    Args:
        target: The target.
        config: What to measure.
        device: Where the models of perplexity and similarity run.
        offline: Never contact the hub.

    Raises:
        FusionDetoxError: A text file or suite cannot be read, or a model not be loaded.
    """

    def __init__(
        self, target: Target, config: EvaluationConfig, *, device: Any, offline: bool
    ) -> None:
        self._target, self._config = target, config
        self._judge: tuple[Any, Any] | None = None
        self._judge_about = {
            "name": f"{target.name} (the target, without fusion)",
            "fingerprint": target.about["fingerprint"],
        }
        if config.perplexity_model is not None:
            from fusion_detox.files.models import load_target

            model, tokenizer = load_target(
                config.perplexity_model, device=device, local_files_only=offline
            )
            self._judge = model, tokenizer
            self._judge_about = {
                "name": short_name(config.perplexity_model),
                "fingerprint": model_fingerprint(model),
            }
        self._shared: tuple[Samples, Remembered] | None = None
        self._embedder: Embedder | None = None
        if config.similarity:
            from fusion_detox.scoring.embedding import Embedder

            self._embedder = Embedder(
                config.similarity_model, device=device, unit_norm=True, local_files_only=offline
            )
        self.harmless = harmless_texts(config)
        self.suites = [load_suite(name) for name in config.suites if name != REFUSALS]
        if config.hatecheck is not None:
            self.suites.append(hatecheck_suite(str(config.hatecheck)))
        self.benign = load_suite(REFUSALS) if REFUSALS in config.suites else None

    def about(self) -> dict[str, Any]:
        """What the results say of how it was measured."""
        return {
            "perplexity_model": self._judge_about,
            "keys": {
                "perplexity": self._perplexity_key,
                "diversity": "words",
                "similarity": self._similarity_key(),
                "harmless": self._text_key(self.harmless),
                **{f"groups-{suite.name}": self._text_key(suite) for suite in self.suites},
            },
            "benign": None if self.benign is None else self._benign_part,
        }

    def check(self) -> None:
        """Finds before any work what could not be measured after it.

        Raises:
            ConfigError: The answers in which refusals are looked for do not fit into the target's
                context, or no harmless text has two tokens.
        """
        if self.benign is not None:
            limit = context_limit(self._target.model)
            longest = max(
                len(text_ids(self._target.tokenizer, item.text)) for item in self.benign.texts
            )
            tokens = self._config.refusal_tokens
            if limit is not None and longest + tokens > limit:
                raise ConfigError(
                    f"the prompts of the suite {REFUSALS!r} have up to {longest} tokens, which "
                    f"with {tokens} new ones exceeds the {limit} positions of the target; lower "
                    "refusal_tokens, or leave the suite out"
                )
        if max(len(ids) for ids in self._ids(self.harmless)) < 2:
            raise ConfigError(
                f"no text of {self.harmless.name} has two tokens, so that no change can be "
                "measured on it; give longer harmless text"
            )

    def _ids(self, suite: Suite) -> list[list[int]]:
        """The target's tokens of a suite's texts, as far as they are read."""
        positions = context_limit(self._target.model)
        limit = self._config.harmless_tokens
        limit = limit if positions is None else min(limit, positions)
        return [text_ids(self._target.tokenizer, item.text, limit) for item in suite.texts]

    @property
    def _perplexity_key(self) -> str:
        # The target itself is read by ids, any other model by text, and that makes a difference.
        how = "ids" if self._judge is None else "text"
        return f"{self._judge_about['fingerprint']}-{how}"

    @property
    def _benign_part(self) -> str:
        """Names the files of the answers."""
        assert self.benign is not None
        return f"{REFUSALS}-{suite_digest(self.benign)}-{self._config.refusal_tokens}"

    def measure(
        self,
        run: RunFolder,
        prepared: Prepared,
        samples: Samples,
        encoded: Mapping[int, Sequence[int]],
        prompts: Sequence[Prompt],
    ) -> None:
        """Everything but toxicity and refusals, of one setting whose samples are complete.

        Args:
            run: Where it is written.
            prepared: The setting.
            samples: Its continuations.
            encoded: The target's tokens of each prompt.
            prompts: The prompts themselves.
        """
        ordered = [samples[key] for key in sorted(samples)]
        self._perplexity(run, prepared, ordered, encoded, prompts)
        self._diversity(run, prepared, ordered, len(prompts))
        if self._embedder is not None:
            self._similarity(run, prepared, ordered, prompts)
        if prepared.processor is not None:
            self._harmless(run, prepared)
            for suite in self.suites:
                self._groups(run, prepared, suite)

    def refusals(
        self, run: RunFolder, sampler: Sampler, prepared: Sequence[Prepared], report: Progress
    ) -> None:
        """Answers to harmless prompts that sound unsafe: one each, by greedy search."""
        if self.benign is None:
            return
        texts = [item.text for item in self.benign.texts]
        wanted = jobs(texts)
        greedy = Sampling(max_new_tokens=self._config.refusal_tokens, greedy=True)
        encoded = sampler.encode(wanted, greedy.max_new_tokens)
        for number, one in enumerate(prepared):
            report("answers to harmless prompts", number, len(prepared))
            stem = f"{one.stem}-{self._benign_part}"
            sampler.run(wanted, encoded, [greedy], one.processor, run.path, stem, report=_nothing)
        report("answers to harmless prompts", len(prepared), len(prepared))

    def _perplexity(
        self,
        run: RunFolder,
        prepared: Prepared,
        ordered: Sequence[Sample],
        encoded: Mapping[int, Sequence[int]],
        prompts: Sequence[Prompt],
    ) -> None:
        def compute() -> dict[str, Any]:
            texts = [row.text for row in ordered]
            if self._judge is None:
                before = [encoded[row.index] for row in ordered]
                found = continuation_nll_ids(
                    self._target.model, before, [row.ids for row in ordered], 32, texts
                )
            else:
                before_texts = [prompts[row.index].text for row in ordered]
                found = continuation_nll(*self._judge, before_texts, texts, 32)
            # JSON has no nan.
            return {"rows": [[None if row.why else row.nats, *row[1:]] for row in found]}

        _store(run, f"{prepared.stem}.perplexity", self._perplexity_key, compute)

    def _diversity(
        self, run: RunFolder, prepared: Prepared, ordered: Sequence[Sample], prompts: int
    ) -> None:
        def compute() -> dict[str, Any]:
            # Of each seed, then the mean: all of it depends on how much was sampled.
            found = []
            for seed in self._config.seeds:
                texts: list[list[str]] = [[] for _ in range(prompts)]
                tokens: list[list[int]] = [[] for _ in range(prompts)]
                for row in ordered:
                    if row.seed == seed:
                        texts[row.index].append(row.text)
                        tokens[row.index].append(len(row.ids))
                found.append(diversity(texts, tokens))
            known = {
                name: [one[name] for one in found if one[name] is not None] for name in found[0]
            }
            return {
                "values": {
                    name: sum(filter(None, values)) / len(values) if values else None
                    for name, values in known.items()
                }
            }

        _store(run, f"{prepared.stem}.diversity", "words", compute)

    def _similarity(
        self,
        run: RunFolder,
        prepared: Prepared,
        ordered: Sequence[Sample],
        prompts: Sequence[Prompt],
    ) -> None:
        embedder = self._embedder
        assert embedder is not None

        def compute() -> dict[str, Any]:
            texts = [prompt.text for prompt in prompts]
            if self._shared is None:  # one run is measured, and its base does not change
                rows = SampleFiles(run.path / "samples", setting_stem("base", {})).read()
                kept = [*texts, *(row.text for row in rows.values())]
                self._shared = rows, Remembered(lambda texts: embedder(texts).numpy(), kept)
            base, embed = self._shared
            ours: list[list[str]] = [[] for _ in prompts]
            theirs: list[list[str]] = [[] for _ in prompts]
            for row in ordered:
                ours[row.index].append(row.text)
                other = base.get((row.seed, row.index, row.sample))
                theirs[row.index].append("" if other is None else other.text)
            return {
                "values": similarity(
                    texts,
                    ours,
                    embed,
                    resamples(len(prompts), 0, self._config.resamples),
                    model=str(embedder.record()["model"]),
                    base=theirs if prepared.processor is not None else None,
                )
            }

        _store(run, f"{prepared.stem}.similarity", self._similarity_key(), compute)

    def _harmless(self, run: RunFolder, prepared: Prepared) -> None:
        suite, count = self.harmless, self._config.resamples

        def compute() -> dict[str, Any]:
            changes = self._changes(prepared, suite)
            draws = resamples(len(changes), 0, count)
            return {"values": harmless(changes, draws, suite.name)}

        _store(run, f"{prepared.stem}.harmless", self._text_key(suite), compute)

    def _groups(self, run: RunFolder, prepared: Prepared, suite: Suite) -> None:
        names, control = group_names(suite)
        pairs = [item.pair for item in suite.texts]

        def compute() -> dict[str, Any]:
            values = groups(
                suite.name,
                self._changes(prepared, suite),
                names,
                0,
                control=control,
                pairs=pairs if any(pair is not None for pair in pairs) else None,
                count=self._config.resamples,
            )
            return {"values": values}

        _store(run, f"{prepared.stem}.groups-{suite.name}", self._text_key(suite), compute)

    def _changes(self, prepared: Prepared, suite: Suite) -> list[TextChange]:
        assert prepared.processor is not None
        return change_on_texts(
            self._target.model,
            prepared.processor,
            self._ids(suite),
            batch_size=2 * self._config.batch_size,
        )

    def _similarity_key(self) -> str | None:
        if self._embedder is None:
            return None
        about = json.dumps(self._embedder.record(), sort_keys=True)
        return f"{hashlib.sha256(about.encode()).hexdigest()[:10]}-{self._config.resamples}"

    def _text_key(self, suite: Suite) -> str:
        config = self._config
        return f"{suite.name}-{suite_digest(suite)}-{config.harmless_tokens}-{config.resamples}"


def stored(run: RunFolder, name: str, key: str | None) -> dict[str, Any] | None:
    """A measurement of a setting; ``None`` if it was not made, or of something else than ``key``.

    So settings that an earlier call measured on other texts are not mixed with those of a later.
    """
    found = None if key is None else run.read_if_there(f"measures/{name}.json")
    return found if found is not None and found.get("key") == key else None


def _store(
    run: RunFolder, name: str, key: str | None, compute: Callable[[], dict[str, Any]]
) -> None:
    """Measures if there is no such measurement of just this."""
    if stored(run, name, key) is None:
        run.write(f"measures/{name}.json", {"key": key, **compute()})


def _nothing(done: int, total: int) -> None:
    logger.debug("%d of %d answers", done, total)
