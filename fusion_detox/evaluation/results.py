"""Builds ``results.json``, which holds all numbers of a run, from the files in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion_detox.errors import DataError
from fusion_detox.evaluation.assistant import HARMLESS, answers_stem
from fusion_detox.evaluation.folder import FORMAT, RunFolder
from fusion_detox.evaluation.measurer import REFUSALS, read_measure
from fusion_detox.evaluation.metrics.fluency import Nll, perplexity
from fusion_detox.evaluation.metrics.statistics import Floats, Resamples, finite
from fusion_detox.evaluation.metrics.suites import refusal
from fusion_detox.evaluation.metrics.toxicity import (
    against_base,
    by_prompts,
    by_seed,
    prompt_values,
    toxicity,
)
from fusion_detox.evaluation.prompts.prompt_sets import Prompt
from fusion_detox.evaluation.samples import SampleFiles, Samples
from fusion_detox.evaluation.sampling import Cost, Progress, total_cost
from fusion_detox.scoring.base import NoTextScoredError
from fusion_detox.scoring.cache import CachedScorer

if TYPE_CHECKING:
    from fusion_detox.scoring.base import Scorer

EXAMPLES = 10
_SEED = 0  # of the bootstrap
_CHUNK = 512

Scores = dict[str, dict[str, dict[str, Floats]]]
"""By scorer, variant and type of toxicity: ``(seeds, prompts, samples)``."""


def build_results(
    run: RunFolder,
    config: Mapping[str, Any],
    scorers: Sequence[Scorer],
    progress: Progress,
    unfinished: str | None = None,
) -> dict[str, Any]:
    """All numbers of a run. Only texts that a scorer has not seen are scored.

    Args:
        run: The run's folder.
        config: The content of ``config.json``.
        scorers: The scorers; the first is the main one.
        progress: Receives the number of scored texts.
        unfinished: How far the run has come, if it is still going on. Settings and
            measurements that are missing are then left out.

    Raises:
        DataError: Continuations are missing although the run is said to be finished.
        FusionDetoxError: A scorer fails on all texts, or a file is damaged.
    """
    fixed, prompts = run.read("run.json"), run.prompts()
    seeds, samples = fixed["seeds"], fixed["sampling"]["samples"]
    shape = (len(seeds), len(prompts), samples)
    rows: dict[str, Samples] = {}
    notes = []
    for name, stem in config["settings"].items():
        found = SampleFiles(run.path / "samples", stem).read()
        if len(found) == math.prod(shape):
            rows[name] = found
        elif unfinished is not None:
            continue
        elif name in config["asked_now"]:
            raise DataError(
                f"{run.path} is not complete: {len(found)} of {math.prod(shape)} continuations of "
                f"the setting {name!r} exist; run `fusion-detox evaluate` again to resume"
            )
        else:
            notes.append(
                f"The setting {name!r} was never completed and is left out; evaluate it again "
                "to finish it."
            )
    scores, scorer_records = _score_all(run, scorers, rows, seeds, shape, progress)
    answers = _assistant_scores(run, config, scorers, list(rows), progress)
    builder = _Builder(run, config, fixed, prompts, rows, scores, answers)
    variants = [builder.variant(name) for name in rows]
    main = next(iter(scorer_records))
    gaps = [] if unfinished else builder.gaps
    sizes = config.get("sizes", "full")
    return {
        "format": FORMAT,
        "name": config["name"],
        "created": config["created"],
        "unfinished": unfinished,
        "sizes": sizes,
        "command": "\n".join(config["commands"]),
        "versions": config["versions"],
        "machine": config["machine"],
        "target": fixed["target"],
        "prompts": fixed["prompts"],
        "sampling": fixed["sampling"],
        "chat": fixed.get("chat"),
        "seeds": seeds,
        "threshold": config["threshold"],
        "scorers": scorer_records,
        "main_scorer": main,
        "perplexity_model": config["perplexity_model"],
        "settings": variants,
        "peers": config.get("peers"),
        "examples": {name: builder.examples(name, scores[main]) for name in rows if name != "base"},
        "notes": [*notes, *_notes(variants, prompts, gaps, sizes)],
    }


class _Builder:
    """Builds the blocks of each variant."""

    def __init__(
        self,
        run: RunFolder,
        config: Mapping[str, Any],
        fixed: Mapping[str, Any],
        prompts: Sequence[Prompt],
        rows: Mapping[str, Samples],
        scores: Scores,
        answers: Scores,
    ) -> None:
        self._run, self._config, self._fixed = run, config, fixed
        self._prompts, self._rows, self._scores = prompts, rows, scores
        self._answers = answers
        self._draws = Resamples(len(prompts), _SEED, config["resamples"])
        self.gaps: list[str] = []
        """Measurements that are missing or were made differently from the others."""
        self._base_nll = self._nll("base")
        self._base_speed = self._total_cost("base").tokens_per_second

    def variant(self, name: str) -> dict[str, Any]:
        """All blocks of one variant."""
        about = self._run.read(f"settings/{self._stem(name)}.json")
        threshold, base = self._config["threshold"], name == "base"
        tables = {scorer: found[name] for scorer, found in self._scores.items()}
        seeds = {scorer: by_seed(t["toxicity"], threshold) for scorer, t in tables.items()}
        bases = {scorer: found["base"]["toxicity"] for scorer, found in self._scores.items()}
        nll = self._nll(name)
        return {
            **about,
            "name": name,
            "toxicity": {
                scorer: {kind: toxicity(t, self._draws, threshold) for kind, t in types.items()}
                for scorer, types in tables.items()
            },
            "prompt_toxicity": {
                scorer: [
                    finite(round(float(value), 4))
                    for value in prompt_values(types["toxicity"], threshold)["probability"]
                ]
                for scorer, types in tables.items()
            },
            "against_base": None
            if base
            else {
                scorer: against_base(types["toxicity"], bases[scorer], self._draws, threshold)
                for scorer, types in tables.items()
            },
            "perplexity": None
            if nll is None
            else perplexity(nll, self._draws, None if base else self._base_nll),
            "diversity": self._values(name, "diversity"),
            "similarity": self._values(name, "similarity"),
            "harmless": self._values(name, "harmless"),
            "groups": [
                row
                for what in self._config["keys"]
                if what.startswith("groups-")
                for row in self._values(name, what) or []
            ],
            "refusal": self._refusal(name),
            "assistant": self._assistant(name),
            "by_prompts": self._by_prompts(tables),
            "by_seed": [
                {"seed": seed, **{scorer: values[number] for scorer, values in seeds.items()}}
                for number, seed in enumerate(self._fixed["seeds"])
            ],
            "cost": self._cost(name),
        }

    def examples(
        self, name: str, scores: Mapping[str, Mapping[str, Floats]]
    ) -> dict[str, list[dict[str, Any]]]:
        """The continuations whose toxicity changed most in either direction, beside the base's."""
        fused, base = scores[name]["toxicity"], scores["base"]["toxicity"]
        difference = np.where(np.isnan(fused - base), 0.0, fused - base)
        seeds = self._fixed["seeds"]

        def pair(flat: int) -> dict[str, Any]:
            seed, index, sample = np.unravel_index(flat, difference.shape)
            key = (seeds[seed], int(index), int(sample))
            return {
                "prompt": self._prompts[int(index)].text,
                "base": self._rows["base"][key].text,
                "fused": self._rows[name][key].text,
                "base_score": round(float(base[seed, index, sample]), 4),
                "fused_score": round(float(fused[seed, index, sample]), 4),
            }

        order = np.argsort(difference, axis=None, kind="stable")
        flat = difference.reshape(-1)
        best = [int(i) for i in order[:EXAMPLES] if flat[i] < 0]
        worst = [int(i) for i in order[::-1][:EXAMPLES] if flat[i] > 0]
        return {"best": [pair(i) for i in best], "worst": [pair(i) for i in worst]}

    def _stem(self, name: str) -> str:
        return str(self._config["settings"][name])

    def _measure(self, name: str, what: str) -> dict[str, Any] | None:
        key = self._config["keys"].get(what)
        found = read_measure(self._run, f"{self._stem(name)}.{what}", key)
        compared = what in ("harmless", "assistant") or what.startswith("groups-")
        of_base = name == "base" and compared
        if found is None and key is not None and not of_base:
            gap = f"{what.partition('-')[0]} of {name!r}"
            if gap not in self.gaps:
                self.gaps.append(gap)
        return found

    def _values(self, name: str, what: str) -> Any:
        found = self._measure(name, what)
        return None if found is None else found["values"]

    def _nll(self, name: str) -> list[list[Nll]] | None:
        """The samples of each prompt, over all seeds."""
        found = self._measure(name, "perplexity")
        if found is None:
            return None
        result: list[list[Nll]] = [[] for _ in self._prompts]
        for key, row in zip(sorted(self._rows[name]), found["rows"], strict=True):
            result[key[1]].append(Nll(math.nan if row[0] is None else row[0], *row[1:]))
        return result

    def _refusal(self, name: str) -> dict[str, Any] | None:
        if self._config["benign"] is None:
            return None
        stem = f"{self._stem(name)}-{self._config['benign']}"
        answers = SampleFiles(self._run.path / "samples", stem).read()
        if not answers:
            return None
        texts = [[answers[key].text] for key in sorted(answers)]
        return refusal(REFUSALS, texts, Resamples(len(texts), _SEED, self._config["resamples"]))

    def _assistant(self, name: str) -> dict[str, Any] | None:
        """The answers of an assistant: changes of harmless ones, toxicity of the others."""
        about = self._config.get("assistant")
        if about is None:
            return None
        found: dict[str, Any] = {HARMLESS: self._values(name, "assistant")}
        threshold, start = self._config["threshold"], 0
        for kind, count in about["kinds"].items():
            own = slice(start, start + count)
            start += count
            tables = {
                scorer: (tables[name]["toxicity"][:, own], tables["base"]["toxicity"][:, own])
                for scorer, tables in self._answers.items()
                if count and name in tables
            }
            draws = Resamples(max(count, 1), _SEED, self._config["resamples"])
            found[kind] = {
                scorer: {
                    **toxicity(fused, draws, threshold),
                    "against_base": None
                    if name == "base"
                    else against_base(fused, base, draws, threshold),
                }
                for scorer, (fused, base) in tables.items()
            }
        return found

    def _by_prompts(self, tables: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
        sets = [prompt.set_name for prompt in self._prompts]
        groups = [f"{prompt.set_name}: {prompt.group or 'no group'}" for prompt in self._prompts]
        divisions = [sets] if len(set(sets)) > 1 else []
        if len(set(groups)) > len(set(sets)):
            divisions.append(groups)
        found: dict[str, Any] = {}
        for names in divisions:
            for scorer, types in tables.items():
                part = by_prompts(
                    types["toxicity"],
                    names,
                    _SEED,
                    self._config["threshold"],
                    self._config["resamples"],
                )
                for name, values in part.items():
                    found.setdefault(name, {})[scorer] = values
        return found

    def _total_cost(self, name: str) -> Cost:
        return total_cost(self._run.path / "costs", self._stem(name))

    def _cost(self, name: str) -> dict[str, Any]:
        cost = self._total_cost(name)
        speed, base = cost.tokens_per_second, self._base_speed
        return {
            "tokens_per_second": speed,
            "relative": speed / base if speed and base else None,
            "peak_memory_bytes": cost.memory or None,
            "seconds": cost.seconds,
        }


def _assistant_scores(
    run: RunFolder,
    config: Mapping[str, Any],
    scorers: Sequence[Scorer],
    names: Sequence[str],
    progress: Progress,
) -> Scores:
    """The scores of the sampled answers to requests, for the settings that have all of them."""
    about = config.get("assistant")
    if about is None:
        return {}
    shape = (1, sum(about["kinds"].values()), about["samples"])
    rows = {}
    for name in names:
        stem = answers_stem(config["settings"][name], about)
        found = SampleFiles(run.path / "samples", stem).read()
        if found and len(found) == math.prod(shape):
            rows[name] = found
    if "base" not in rows:
        return {}
    return _score_all(run, scorers, rows, [about["seed"]], shape, progress)[0]


def _score_all(
    run: RunFolder,
    scorers: Sequence[Scorer],
    rows: Mapping[str, Samples],
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    progress: Progress,
) -> tuple[Scores, dict[str, Any]]:
    """The scores of all continuations, and the records of the scorers."""
    order = {seed: number for number, seed in enumerate(seeds)}
    texts = list(dict.fromkeys(row.text for found in rows.values() for row in found.values()))
    scores: Scores = {}
    records: dict[str, Any] = {}
    for inner in scorers:
        scorer = CachedScorer(inner, run.path / "scores" / f"{inner.name}.jsonl")
        known: dict[str, dict[str, float]] = {}
        failed: NoTextScoredError | None = None
        for start in range(0, len(texts), _CHUNK):
            progress(f"scoring: {inner.name}", start, len(texts))
            chunk = texts[start : start + _CHUNK]
            try:
                types = scorer.score_types(chunk)
            except NoTextScoredError as error:  # other chunks may succeed
                failed = error
                continue
            for kind, values in types.items():
                known.setdefault(kind, {}).update(zip(chunk, values, strict=True))
        progress(f"scoring: {inner.name}", len(texts), len(texts))
        if failed is not None and not known:
            raise failed
        records[inner.name] = scorer.record()
        scores[inner.name] = {}
        for name, found in rows.items():
            tables = {kind: np.full(shape, np.nan) for kind in known}
            for (seed, index, sample), row in found.items():
                for kind, of_text in known.items():
                    tables[kind][order[seed], index, sample] = of_text.get(row.text, math.nan)
            scores[inner.name][name] = tables
    return scores, records


def _notes(
    variants: Sequence[Mapping[str, Any]],
    prompts: Sequence[Prompt],
    gaps: Sequence[str],
    sizes: str,
) -> list[str]:
    """Caveats that a reader must know to interpret the numbers."""
    notes = []
    if sizes == "quick":
        notes.append(
            "This is a quick look with few samples and few texts, so its intervals are wide. For "
            "numbers to rely on, leave out --quick and give more prompts."
        )
    if gaps:
        notes.append(
            "Left out, because they were not measured, or were measured in an earlier call with "
            f"other texts or models: {', '.join(gaps)}. Evaluate these "
            "settings again to measure them like the others."
        )
    repeated = len(prompts) - len({prompt.text for prompt in prompts})
    if repeated:
        notes.append(
            f"{repeated} of {len(prompts)} prompts are duplicates of others, so intervals are "
            "slightly too narrow."
        )
    for variant in variants:
        name = variant["name"]
        tuned = variant.get("prompts_tuned_on")
        if tuned:
            notes.append(
                f"{tuned} of {len(prompts)} prompts were used to tune the settings of the "
                f"calibrator of {name!r}, so its numbers look too good."
            )
        for scorer, types in variant["toxicity"].items():
            failed = types["toxicity"]["failed"]
            if failed:
                notes.append(
                    f"{scorer} could not score {failed} continuations of {name!r}; they are "
                    "left out (in comparisons, on both sides)."
                )
        block = variant["perplexity"]
        if block and block["not_scored"]:
            notes.append(
                f"Perplexity of {name!r} leaves out {block['not_scored']} of "
                f"{block['scored'] + block['not_scored']} continuations: {block['why']}."
            )
    return notes
