"""``results.json``: every number of a run, from what its folder holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion_detox.errors import DataError
from fusion_detox.evaluation.folder import FORMAT, RunFolder
from fusion_detox.evaluation.measurer import stored
from fusion_detox.evaluation.metrics.fluency import Nll, perplexity
from fusion_detox.evaluation.metrics.refusal import refusal
from fusion_detox.evaluation.metrics.statistics import Floats, resamples
from fusion_detox.evaluation.metrics.toxicity import against_base, by_prompts, by_seed, toxicity
from fusion_detox.evaluation.prompts.prompt_sets import Prompt
from fusion_detox.evaluation.samples import Sample, SampleFiles
from fusion_detox.evaluation.sampling import Cost, Progress, total_cost
from fusion_detox.scoring.base import NoTextScoredError
from fusion_detox.scoring.cache import CachedScorer

if TYPE_CHECKING:
    from fusion_detox.scoring.base import Scorer

EXAMPLES = 10
_SEED = 0  # of the bootstrap
_CHUNK = 512

Rows = Mapping[tuple[int, int, int], Sample]


def build_results(
    run: RunFolder, asked: Mapping[str, Any], scorers: Sequence[Scorer], progress: Progress
) -> dict[str, Any]:
    """All numbers of a run; texts that a scorer has not seen are scored, the rest is read.

    Args:
        run: Its folder.
        asked: The content of ``asked.json``.
        scorers: The first is the main one.
        progress: Told how many texts are scored.

    Raises:
        DataError: Continuations are missing, as the run was interrupted.
        FusionDetoxError: A scorer fails on all texts, or a file is damaged.
    """
    fixed, prompts = run.read("run.json"), run.prompts()
    seeds, samples = fixed["seeds"], fixed["sampling"]["samples"]
    shape = (len(seeds), len(prompts), samples)
    rows: dict[str, Rows] = {}
    notes = []
    for name, stem in asked["settings"].items():
        found = SampleFiles(run.path / "samples", stem).read()
        if len(found) == math.prod(shape):
            rows[name] = found
        elif name in asked["asked_now"]:
            raise DataError(
                f"{run.path} is not complete: {len(found)} of {math.prod(shape)} continuations of "
                f"the setting {name!r} are there; run `fusion-detox evaluate` again to go on with "
                "it"
            )
        else:
            notes.append(
                f"The setting {name!r} was given up before it was complete and is left out; ask "
                "for it again to finish it."
            )
    scores, about_scorers = _scores(run, scorers, rows, seeds, shape, progress)
    builder = _Builder(run, asked, fixed, prompts, rows, scores)
    settings = [builder.setting(name) for name in rows]
    main = next(iter(about_scorers))
    return {
        "format": FORMAT,
        "name": asked["name"],
        "created": asked["created"],
        "command": "\n".join(asked["commands"]),
        "versions": asked["versions"],
        "machine": asked["machine"],
        "target": fixed["target"],
        "prompts": fixed["prompts"],
        "sampling": fixed["sampling"],
        "seeds": seeds,
        "threshold": asked["threshold"],
        "scorers": about_scorers,
        "main_scorer": main,
        "perplexity_model": asked["perplexity_model"],
        "settings": settings,
        "examples": {name: builder.examples(name, scores[main]) for name in rows if name != "base"},
        "notes": [*notes, *_notes(settings, prompts, builder.gaps)],
    }


class _Builder:
    """The blocks of one setting after the other."""

    def __init__(
        self,
        run: RunFolder,
        asked: Mapping[str, Any],
        fixed: Mapping[str, Any],
        prompts: Sequence[Prompt],
        rows: Mapping[str, Rows],
        scores: Mapping[str, Mapping[str, Mapping[str, Floats]]],
    ) -> None:
        self._run, self._asked, self._fixed = run, asked, fixed
        self._prompts, self._rows, self._scores = prompts, rows, scores
        self._draws = resamples(len(prompts), _SEED, asked["resamples"])
        self.gaps: list[str] = []
        """What was not measured, or not as the others were."""
        self._base_nll = self._nll("base")
        self._base_speed = self._total_cost("base").tokens_per_second

    def setting(self, name: str) -> dict[str, Any]:
        """Everything about one setting."""
        about = self._run.read(f"settings/{self._asked['settings'][name]}.json")
        threshold, base = self._asked["threshold"], name == "base"
        tables = {scorer: found[name] for scorer, found in self._scores.items()}
        seeds = {scorer: by_seed(t["toxicity"], threshold) for scorer, t in tables.items()}
        nll = self._nll(name)
        return {
            **about,
            "name": name,
            "toxicity": {
                scorer: {kind: toxicity(t, self._draws, threshold) for kind, t in types.items()}
                for scorer, types in tables.items()
            },
            "against_base": None
            if base
            else {
                scorer: against_base(
                    types["toxicity"],
                    self._scores[scorer]["base"]["toxicity"],
                    self._draws,
                    threshold,
                )
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
                for what in self._asked["keys"]
                if what.startswith("groups-")
                for row in self._values(name, what) or []
            ],
            "refusal": self._refusal(name),
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
        """The pairs that fusion made least and most toxic, by the main scorer."""
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
        return str(self._asked["settings"][name])

    def _values(self, name: str, what: str) -> Any:
        found = self._stored(name, what)
        return None if found is None else found["values"]

    def _stored(self, name: str, what: str) -> dict[str, Any] | None:
        key = self._asked["keys"].get(what)
        found = stored(self._run, f"{self._stem(name)}.{what}", key)
        of_base = name == "base" and (what == "harmless" or what.startswith("groups-"))
        if found is None and key is not None and not of_base:
            gap = f"{what.partition('-')[0]} of {name!r}"
            if gap not in self.gaps:
                self.gaps.append(gap)
        return found

    def _nll(self, name: str) -> list[list[Nll]] | None:
        """Of each prompt's samples, seeds together."""
        found = self._stored(name, "perplexity")
        if found is None:
            return None
        result: list[list[Nll]] = [[] for _ in self._prompts]
        for key, row in zip(sorted(self._rows[name]), found["rows"], strict=True):
            result[key[1]].append(Nll(math.nan if row[0] is None else row[0], *row[1:]))
        return result

    def _refusal(self, name: str) -> dict[str, Any] | None:
        if self._asked["benign"] is None:
            return None
        stem = f"{self._stem(name)}-{self._asked['benign']}"
        answers = SampleFiles(self._run.path / "samples", stem).read()
        if not answers:
            return None
        texts = [[answers[key].text] for key in sorted(answers)]
        return refusal("benign", texts, resamples(len(texts), _SEED, self._asked["resamples"]))

    def _by_prompts(self, tables: Mapping[str, Mapping[str, Floats]]) -> dict[str, Any]:
        sets = [prompt.set_name for prompt in self._prompts]
        groups = [f"{prompt.set_name}: {prompt.group or 'no group'}" for prompt in self._prompts]
        found: dict[str, Any] = {}
        for names in (sets, groups):
            # A set without groups, or all of one, has nothing to be divided into.
            if len(set(names)) < 2 or (names is groups and len(set(groups)) == len(set(sets))):
                continue
            for scorer, types in tables.items():
                part = by_prompts(
                    types["toxicity"],
                    names,
                    _SEED,
                    self._asked["threshold"],
                    self._asked["resamples"],
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


def _scores(
    run: RunFolder,
    scorers: Sequence[Scorer],
    rows: Mapping[str, Rows],
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    progress: Progress,
) -> tuple[dict[str, dict[str, dict[str, Floats]]], dict[str, Any]]:
    """Scores by scorer, setting and type, ``(seeds, prompts, samples)``; the scorers' records."""
    order = {seed: number for number, seed in enumerate(seeds)}
    texts = list(dict.fromkeys(row.text for found in rows.values() for row in found.values()))
    scores: dict[str, dict[str, dict[str, Floats]]] = {}
    about: dict[str, Any] = {}
    for inner in scorers:
        scorer = CachedScorer(inner, run.path / "scores" / f"{inner.name}.jsonl")
        known: dict[str, dict[str, float]] = {}
        failed: NoTextScoredError | None = None
        for start in range(0, len(texts), _CHUNK):
            progress(f"scoring: {inner.name}", start, len(texts))
            part = texts[start : start + _CHUNK]
            try:
                found_scores = scorer.score_types(part)
            except NoTextScoredError as error:  # other parts may do better
                failed = error
                continue
            for kind, values in found_scores.items():
                known.setdefault(kind, {}).update(zip(part, values, strict=True))
        progress(f"scoring: {inner.name}", len(texts), len(texts))
        if failed is not None and not known:
            raise failed
        about[inner.name] = scorer.record()
        scores[inner.name] = {}
        for name, found in rows.items():
            tables = {kind: np.full(shape, np.nan) for kind in known}
            for (seed, index, sample), row in found.items():
                for kind, of_text in known.items():
                    tables[kind][order[seed], index, sample] = of_text.get(row.text, math.nan)
            scores[inner.name][name] = tables
    return scores, about


def _notes(
    settings: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], gaps: Sequence[str]
) -> list[str]:
    """Sentences that a reader must know before believing the numbers."""
    notes = []
    if gaps:
        notes.append(
            f"Not measured, or in an earlier call with other texts or models: {', '.join(gaps)}; "
            "left out. Ask for these settings again to measure them like the others."
        )
    repeated = len(prompts) - len({prompt.text for prompt in prompts})
    if repeated:
        notes.append(
            f"{repeated} of {len(prompts)} prompts repeat another one; intervals are a little too "
            "narrow."
        )
    for setting in settings:
        name = setting["name"]
        tuned = setting.get("prompts_tuned_on")
        if tuned:
            notes.append(
                f"{tuned} of {len(prompts)} prompts took part in tuning the settings of the "
                f"calibrator of {name!r}: its numbers flatter it."
            )
        for scorer, types in setting["toxicity"].items():
            failed = types["toxicity"]["failed"]
            if failed:
                notes.append(
                    f"{scorer} could not score {failed} continuations of {name!r}; they count for "
                    "neither side."
                )
        block = setting["perplexity"]
        if block and block["not_scored"]:
            notes.append(
                f"Perplexity of {name!r} leaves out {block['not_scored']} of "
                f"{block['scored'] + block['not_scored']} continuations: {block['why']}."
            )
    return notes
