"""Measures everything except toxicity. A stored measurement is not repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import ConfigError
from fusion_detox.evaluation.assistant import HARMLESS, PROVOKING, AssistantSuite, is_assistant
from fusion_detox.evaluation.config import EvaluationConfig
from fusion_detox.evaluation.folder import RunFolder
from fusion_detox.evaluation.metrics.diversity import diversity
from fusion_detox.evaluation.metrics.fluency import (
    context_limit,
    continuation_nll,
    continuation_nll_ids,
)
from fusion_detox.evaluation.metrics.groups import groups
from fusion_detox.evaluation.metrics.harmless import (
    TextChange,
    changes_on_texts,
    harmless,
    text_ids,
)
from fusion_detox.evaluation.metrics.similarity import Remembered, similarity
from fusion_detox.evaluation.metrics.statistics import Resamples
from fusion_detox.evaluation.metrics.suites import (
    Suite,
    hatecheck_suite,
    load_suite,
    suite_from_file,
)
from fusion_detox.evaluation.plan import Plan
from fusion_detox.evaluation.prompts.prompt_sets import Prompt
from fusion_detox.evaluation.samples import Sample, SampleFiles, Samples
from fusion_detox.evaluation.sampling import Sampler
from fusion_detox.evaluation.targets import Prepared, Target, load_for_measuring
from fusion_detox.evaluation.variants import variant_stem
from fusion_detox.files.fingerprints import model_fingerprint, short_name
from fusion_detox.generation.chat import chat_prompt
from fusion_detox.generation.sampling import Sampling, jobs

if TYPE_CHECKING:
    from fusion_detox.scoring.embedding import Embedder

REFUSALS = "benign"
"""The suite of prompts whose answers are searched for refusals."""
_NLL_BATCH = 32
_GREEDY, _CHANGES = "assistant: answers to harmless requests", "assistant: changed answers"
STEP, _PASS = 3, 1
"""Rough costs of writing and of reading a token, as multiples of fusing it in a known text."""


class Measurer:
    """Measures the variants of one target and writes the results into a run's folder.

    Args:
        target: The target.
        config: What to measure.
        device: Device of the models that measure perplexity and similarity.
        offline: Never contact the hub.

    Raises:
        FusionDetoxError: A file of texts cannot be read, or a model cannot be loaded.
    """

    def __init__(
        self, target: Target, config: EvaluationConfig, *, device: Any, offline: bool
    ) -> None:
        self._target, self._config = target, config
        # The target itself reads token ids; any other model reads text. The results differ.
        self._perplexity_model: tuple[Any, Any] | None = None
        about = {
            "name": f"{target.name} (the target, without fusion)",
            "fingerprint": target.about["fingerprint"],
        }
        read = "ids"
        if config.perplexity_model is not None:
            self._perplexity_model = load_for_measuring(
                config.perplexity_model, device=device, local_files_only=offline
            )
            about = {
                "name": short_name(config.perplexity_model),
                "fingerprint": model_fingerprint(self._perplexity_model[0]),
            }
            read = "text"
        self._embedder: Embedder | None = None
        if config.similarity:
            from fusion_detox.scoring.embedding import Embedder

            self._embedder = Embedder(
                config.similarity_model, device=device, unit_norm=True, local_files_only=offline
            )
        self._base: tuple[Samples, Remembered] | None = None
        general = suite_from_file(config.harmless) if config.harmless else load_suite("general")
        texts = general.texts[: config.harmless_texts]
        self._harmless = dataclasses.replace(general, texts=texts)
        suites = [load_suite(name) for name in config.suites if name != REFUSALS]
        if config.hatecheck is not None:
            suites.append(hatecheck_suite(config.hatecheck))
        self._suites = [suite.spread(config.group_texts) for suite in suites]
        self._benign = load_suite(REFUSALS) if REFUSALS in config.suites else None
        self._keys = {
            "perplexity": f"{about['fingerprint']}-{read}",
            "diversity": "words",
            "similarity": self._similarity_key(),
            "harmless": self._suite_key(self._harmless),
            **{f"groups-{suite.name}": self._suite_key(suite) for suite in self._suites},
        }
        applies = is_assistant(target.model, target.tokenizer)
        self._assistant: AssistantSuite | None = None
        if config.assistant or (applies and config.assistant is None):
            self._assistant = AssistantSuite(target, config)
            self._keys["assistant"] = self._assistant.key
        self.about: dict[str, Any] = {
            "perplexity_model": about,
            "keys": self._keys,
            "benign": None if self._benign is None else self._answers_key(self._benign),
            "assistant": None if self._assistant is None else self._assistant.about,
        }
        """Facts for ``config.json``: how the variants were measured."""

    def check(self) -> None:
        """Raises an error before any work if something cannot be measured later.

        Raises:
            ConfigError: The answers to be searched for refusals exceed the target's context, or no
                harmless text has two tokens.
        """
        tokenizer = self._target.tokenizer
        if self._benign is not None:
            limit = context_limit(self._target.model)
            config, texts = self._config, [item.text for item in self._benign.texts]
            tokens = config.refusal_tokens
            if config.chat:
                texts = [chat_prompt(tokenizer, text, config.system) for text in texts]
            longest = max(len(text_ids(tokenizer, text)) for text in texts)
            if limit is not None and longest + tokens > limit:
                raise ConfigError(
                    f"the prompts of the suite {REFUSALS!r} have up to {longest} tokens, and "
                    f"with {tokens} new ones exceed the {limit} positions of the target; lower "
                    "refusal_tokens, or leave the suite out"
                )
        if max(len(ids) for ids in self._ids(self._harmless)) < 2:
            raise ConfigError(
                f"no text of {self._harmless.name} has two tokens, so no change can be measured "
                "on it; give longer harmless text"
            )

    def steps(self, prepared: Sequence[Prepared]) -> dict[str, int]:
        """The steps of :meth:`compare` and :meth:`answer`, with their work in tokens."""
        compared = sum(one.processor is not None for one in prepared)
        found = {}
        for suite in (self._harmless, *self._suites) if compared else ():
            tokens = sum(map(len, self._ids(suite)))
            found[_title(suite)] = tokens * (_PASS + compared)
        if self._benign is not None:
            tokens = len(self._benign.texts) * self._config.refusal_tokens
            found |= {f"refusals: {one.variant.name}": STEP * tokens for one in prepared}
        if self._assistant is not None:
            work = self._assistant.work
            found[_GREEDY] = STEP * work[HARMLESS]
            if compared:
                found[_CHANGES] = work[HARMLESS] * (2 * _PASS + compared)
            found |= {f"assistant: {one.variant.name}": STEP * work[PROVOKING] for one in prepared}
        return found

    def measure(
        self,
        run: RunFolder,
        prepared: Prepared,
        samples: Samples,
        encoded: Mapping[int, Sequence[int]],
        prompts: Sequence[Prompt],
    ) -> None:
        """Measures a variant's continuations, which must be complete, except for their toxicity.

        Args:
            run: The folder to write to.
            prepared: The variant.
            samples: The variant's continuations.
            encoded: Token ids of each prompt, by prompt index.
            prompts: The prompts.
        """
        rows = [samples[key] for key in sorted(samples)]
        texts = [prompt.text for prompt in prompts]
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "perplexity": lambda: {"rows": self._perplexity(rows, encoded, texts)},
            "diversity": lambda: {"values": self._diversity(rows, len(prompts))},
        }
        if self._embedder is not None:
            compared = prepared.processor is not None
            measures["similarity"] = lambda: {
                "values": self._similarity(run, rows, texts, compared=compared)
            }
        for what, compute in measures.items():
            if self._missing(run, prepared, what):
                self._write(run, prepared, what, compute())

    def compare(self, run: RunFolder, prepared: Sequence[Prepared], plan: Plan) -> None:
        """Measures how variants change given texts. The target reads each text once for all.

        Args:
            run: The folder to write to.
            prepared: The variants.
            plan: Receives the progress.
        """
        compared = [one for one in prepared if one.processor is not None]
        for suite in (self._harmless, *self._suites) if compared else ():
            told = plan.start(_title(suite))
            what = "harmless" if suite is self._harmless else f"groups-{suite.name}"
            missing = [one for one in compared if self._missing(run, one, what)]
            if missing:
                found = changes_on_texts(
                    self._target.model,
                    [one.processor for one in missing if one.processor is not None],
                    self._ids(suite),
                    batch_size=2 * self._config.batch_size,
                    report=told,
                )
                for one, changes in zip(missing, found, strict=True):
                    block: Any = (
                        self._change(changes)
                        if suite is self._harmless
                        else self._groups(changes, suite)
                    )
                    self._write(run, one, what, {"values": block})
                    one.free()
            else:
                told(1, 1)

    def answer(
        self, run: RunFolder, sampler: Sampler, prepared: Sequence[Prepared], plan: Plan
    ) -> None:
        """Generates answers to harmless prompts that sound unsafe, and to an assistant's requests.

        Args:
            run: The folder to write to.
            sampler: Generates them.
            prepared: The variants; the first is the target alone.
            plan: Receives the progress.
        """
        if self._benign is not None:
            self._answer_benign(run, sampler, prepared, plan)
        suite = self._assistant
        if suite is None:
            return
        suite.answer_harmless(run, sampler, prepared[0], plan.start(_GREEDY))
        compared = [one for one in prepared if one.processor is not None]
        if compared:
            told = plan.start(_CHANGES)
            own = sampler.processes.share(compared)
            missing = [one for one in own if self._missing(run, one, "assistant")]
            if missing:
                values = suite.changes(run, prepared[0], missing, told)
                for one, block in zip(missing, values, strict=True):
                    self._write(run, one, "assistant", {"values": block})
            else:
                told(1, 1)
        for one in prepared:
            suite.answer_provoking(run, sampler, one, plan.start(f"assistant: {one.variant.name}"))
            one.free()

    def _answer_benign(
        self, run: RunFolder, sampler: Sampler, prepared: Sequence[Prepared], plan: Plan
    ) -> None:
        assert self._benign is not None
        config = self._config
        texts = [item.text for item in self._benign.texts]
        wanted = jobs(texts, chat=config.chat, system=config.system)
        greedy = Sampling(max_new_tokens=self._config.refusal_tokens, greedy=True)
        encoded = sampler.encode(wanted, greedy.max_new_tokens)
        for one in prepared:
            told = plan.start(f"refusals: {one.variant.name}")
            stem = f"{one.stem}-{self._answers_key(self._benign)}"
            sampler.run(wanted, encoded, [greedy], one.processor, run.path, stem, report=told)
            one.free()

    def _missing(self, run: RunFolder, prepared: Prepared, what: str) -> bool:
        return read_measure(run, f"{prepared.stem}.{what}", self._keys[what]) is None

    def _write(self, run: RunFolder, prepared: Prepared, what: str, values: dict[str, Any]) -> None:
        run.write(f"measures/{prepared.stem}.{what}.json", {"key": self._keys[what], **values})

    def _perplexity(
        self,
        rows: Sequence[Sample],
        encoded: Mapping[int, Sequence[int]],
        prompts: Sequence[str],
    ) -> list[list[Any]]:
        texts = [row.text for row in rows]
        if self._perplexity_model is None:
            before = [encoded[row.index] for row in rows]
            ids = [row.ids for row in rows]
            found = continuation_nll_ids(self._target.model, before, ids, _NLL_BATCH, texts)
        else:
            end = "\n" if self._config.chat else ""  # a request and its answer are two texts
            before_texts = [prompts[row.index] + end for row in rows]
            found = continuation_nll(*self._perplexity_model, before_texts, texts, _NLL_BATCH)
        # JSON has no nan.
        return [[None if row.why else row.nats, *row[1:]] for row in found]

    def _diversity(self, rows: Sequence[Sample], prompts: int) -> dict[str, float | None]:
        """The mean over seeds: diversity depends on the amount of text, so seeds are not pooled."""
        found = []
        for seed in self._config.seeds:
            texts: list[list[str]] = [[] for _ in range(prompts)]
            tokens: list[list[int]] = [[] for _ in range(prompts)]
            for row in rows:
                if row.seed == seed:
                    texts[row.index].append(row.text)
                    tokens[row.index].append(len(row.ids))
            found.append(diversity(texts, tokens))
        result: dict[str, float | None] = {}
        for name in found[0]:
            values = [value for one in found if (value := one[name]) is not None]
            result[name] = sum(values) / len(values) if values else None
        return result

    def _similarity(
        self, run: RunFolder, rows: Sequence[Sample], prompts: Sequence[str], *, compared: bool
    ) -> dict[str, Any]:
        embedder = self._embedder
        assert embedder is not None
        if self._base is None:  # the base of a run does not change
            found = SampleFiles(run.path / "samples", variant_stem("base", {})).read()
            kept = [*prompts, *(row.text for row in found.values())]
            self._base = found, Remembered(lambda texts: embedder(texts).numpy(), kept)
        base, embed = self._base
        ours: list[list[str]] = [[] for _ in prompts]
        theirs: list[list[str]] = [[] for _ in prompts]
        for row in rows:
            ours[row.index].append(row.text)
            other = base.get((row.seed, row.index, row.sample))
            theirs[row.index].append("" if other is None else other.text)
        return similarity(
            prompts,
            ours,
            embed,
            Resamples(len(prompts), 0, self._config.resamples),
            model=str(embedder.record()["model"]),
            base=theirs if compared else None,
        )

    def _change(self, changes: Sequence[TextChange]) -> dict[str, Any]:
        draws = Resamples(len(changes), 0, self._config.resamples)
        return harmless(changes, draws, self._harmless.name)

    def _groups(self, changes: Sequence[TextChange], suite: Suite) -> list[dict[str, Any]]:
        names, control = suite.group_names()
        pairs = [item.pair for item in suite.texts]
        return groups(
            suite.name,
            changes,
            names,
            0,
            control=control,
            pairs=pairs if any(pair is not None for pair in pairs) else None,
            count=self._config.resamples,
        )

    def _ids(self, suite: Suite) -> list[list[int]]:
        """The target's token ids of a suite's texts, truncated."""
        positions = context_limit(self._target.model)
        limit = self._config.harmless_tokens
        limit = limit if positions is None else min(limit, positions)
        return [text_ids(self._target.tokenizer, item.text, limit) for item in suite.texts]

    def _similarity_key(self) -> str | None:
        if self._embedder is None:
            return None
        about = json.dumps(self._embedder.record(), sort_keys=True)
        return f"{hashlib.sha256(about.encode()).hexdigest()[:10]}-{self._config.resamples}"

    def _suite_key(self, suite: Suite) -> str:
        config = self._config
        return f"{suite.name}-{suite.digest()}-{config.harmless_tokens}-{config.resamples}"

    def _answers_key(self, benign: Suite) -> str:
        return f"{REFUSALS}-{benign.digest()}-{self._config.refusal_tokens}"


def _title(suite: Suite) -> str:
    return f"reading harmless texts: {suite.name}"


def read_measure(run: RunFolder, name: str, key: str | None) -> dict[str, Any] | None:
    """A stored measurement; ``None`` if it is missing or was made with another ``key``.

    The key prevents mixing measurements of different texts or models.
    """
    name = f"measures/{name}.json"
    if key is None or not (run.path / name).is_file():
        return None
    found = run.read(name)
    return found if found.get("key") == key else None
