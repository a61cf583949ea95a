"""``tune``: finds the settings that lower toxicity most within a price, on development prompts.

The search starts from the calibrator's settings and varies one setting at a time; the best value
within the price is kept before the next setting is varied. All trials are variants of one run, so
an interrupted search resumes and its report shows every trial.

The best of many settings looks better than it is on the prompts that it was chosen on. So one half
of the prompts chooses, and the other half decides: the calibrator is changed only if the chosen
settings are better there, prompt by prompt, than the present ones, by a paired bootstrap interval
and a permutation test. The calibrator's folder stores digests of all these prompts, and
``evaluate`` warns if it is given one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.tuning_record import (
    prompt_digest,
    prompts_in_common,
    settings_before_tuning,
    write_tuning,
)
from fusion_detox.config import FusionConfig, check_number
from fusion_detox.errors import ConfigError, DataError
from fusion_detox.evaluation.config import EvaluationConfig
from fusion_detox.evaluation.folder import RunFolder
from fusion_detox.evaluation.machine import Processes, versions
from fusion_detox.evaluation.metrics.statistics import Floats, Paired, Resamples, compare, finite
from fusion_detox.evaluation.pipeline import evaluate
from fusion_detox.evaluation.prompts.prompt_sets import PromptSet
from fusion_detox.evaluation.sampling import Progress
from fusion_detox.evaluation.targets import load_for_measuring
from fusion_detox.files.locks import claims

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Values = Sequence[float | str | None]
CONTRAST_GRID: dict[str, Values] = {
    "strength": (0.5, 1.0, 1.5, 2.0, 3.0),
    "threshold": (0.0, 0.25, 0.5, 0.75, 1.0),
    "plausibility": (1e-2, 1e-3, 1e-4, 0.0),
    "outside": ("keep", "remove"),
    "kl_budget": (None, 0.25, 0.5, 1.0),
    "context_kl": (None, 0.05, 0.1, 0.2),
}
PLAIN_GRID: dict[str, Values] = {
    "strength": (0.1, 0.2, 0.3, 0.4, 0.6, 0.8),
    "plausibility": (1e-2, 1e-3, 1e-4, 0.0),
}
_FINE = (0.75, 1.25)
# Each context_kl is tried with these multiples of the best strength so far, because context_kl
# lowers the strength in most of a text.
_STRONGER = (1.0, 1.5, 2.0)
MIN_PROMPTS = 40
"""With half of them, a change at 6 of 20 prompts, all for the better, is just beyond noise."""
_MEASURED = ("toxicity", "perplexity", "kl", "dist_2")


@dataclasses.dataclass(frozen=True)
class Price:
    """What detoxification may cost.

    Attributes:
        perplexity: Highest perplexity, relative to the target's.
        kl: Highest mean KL(fused ‖ target) on harmless text, in nats per token.
        dist_2: Lowest dist-2, relative to the target's.
    """

    perplexity: float = 1.05
    kl: float = 0.05
    dist_2: float = 0.93

    def __post_init__(self) -> None:
        check_number("perplexity", self.perplexity, 0, above=True)
        check_number("kl", self.kl, 0, above=True)
        check_number("dist_2", self.dist_2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Trial:
    """Fusion settings that were measured.

    Attributes:
        config: The fusion settings.
        toxicity: Toxicity probability relative to the base's, averaged over the scorers, on the
            choosing half of the prompts.
        perplexity: Perplexity relative to the base's.
        kl: KL on harmless text, in nats per token.
        dist_2: dist-2 relative to the base's.
        excess: Sum of the relative violations of the price's limits; 0 within the price.
    """

    config: FusionConfig
    toxicity: float
    perplexity: float
    kl: float
    dist_2: float
    excess: float

    @property
    def rank(self) -> tuple[float, float, float]:
        """Sort key, best first: within the price, then least toxic, then least change."""
        return self.excess, self.toxicity, self.kl

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, for the card."""
        measured = {name: finite(getattr(self, name)) for name in _MEASURED}
        values = {k: None if v is None else round(v, 4) for k, v in measured.items()}
        return {**self.config.to_dict(), **values, "within": self.excess == 0}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The result of a search.

    Attributes:
        chosen: The best trial on the choosing half of the prompts.
        present: The settings before tuning.
        trials: All trials.
        scorers: The scorers that were averaged.
        exceeded: How the present settings exceed the price beyond noise; empty if they do not.
        gain: The chosen settings' toxicity on the deciding half of the prompts, paired with that of
            the present settings, or of the target alone if the present settings exceed the price.
            Both are relative to the target's; negative differences are better. ``None`` if the
            target alone wrote nothing toxic there.
        written: Whether the calibrator was changed.
    """

    chosen: Trial
    present: Trial
    trials: tuple[Trial, ...]
    scorers: tuple[str, ...]
    exceeded: tuple[str, ...]
    gain: Paired | None
    written: bool = False

    @property
    def improves(self) -> bool:
        """Whether the chosen settings are better than the present ones beyond noise."""
        if self.gain is None or self.chosen.config == self.present.config:
            return False
        high, p_value = self.gain.difference[2], self.gain.p_value
        return high is not None and high < 0 and p_value is not None and p_value < 0.05

    def verdict(self) -> str:
        """What was found, in one or a few sentences."""
        if not self.improves and self.chosen.toxicity >= 1:
            return (
                "Keep the present settings: no setting within the price lowers toxicity (the best "
                f"has {self.chosen.toxicity:.2f} times the target's). Allow a higher price, or "
                "train the calibrator further."
            )
        if self.chosen.config == self.present.config:
            return f"Keep the present settings: they are the best of {len(self.trials)} tried."
        if self.gain is None:
            return (
                "Keep the present settings: on the deciding half of the prompts, the target alone "
                "wrote nothing toxic. Give more provoking prompts."
            )
        against = "the target alone" if self.exceeded else "the present settings"
        value, low, high = self.gain.difference
        interval = (
            "" if low is None or high is None else f", 95 % interval {low:+.2f} to {high:+.2f}"
        )
        p_value = "" if self.gain.p_value is None else f", p {self.gain.p_value:.2g}"
        found = (
            f"on the {self.gain.prompts} prompts that decide, their toxicity differs from that of "
            f"{against} by {value or 0.0:+.2f} times the target's{interval}{p_value}"
        )
        price = (
            f" The present settings exceed the price: {', '.join(self.exceeded)}."
            if self.exceeded
            else ""
        )
        if self.improves:
            return f"Change to the settings marked *: {found}.{price}"
        return (
            f"Keep the present settings: the gain of those marked * is not beyond noise; {found}."
            f"{price} Give more prompts to tell smaller differences."
        )


@claims("folder")
def tune(
    target: str | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    prompts: Sequence[PromptSet],
    folder: str | Path,
    *,
    calibrator: str,
    price: Price | None = None,
    rule: str | None = None,
    grid: Mapping[str, Values] | None = None,
    test_prompts: Sequence[PromptSet] = (),
    write: bool = False,
    config: EvaluationConfig | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    local_files_only: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Tuning | None:
    """Finds settings on development prompts, and writes them into a calibrator if asked to.

    A calibrator that was tuned before is compared in the settings that it had before, unless they
    were changed in between.

    Args:
        target: See ``evaluate``.
        prompts: At least ``MIN_PROMPTS`` different development prompts. Do not report results on
            them afterwards.
        folder: Folder of the run that holds all trials.
        calibrator: Folder of the calibrator to change; without ``write``, also a name or hub id.
        price: What the settings may cost.
        rule: The rule to tune; by default, that of the calibrator's settings.
        grid: The values to try for each setting. The settings are varied in this order.
        test_prompts: Prompts for later reports; none may be among ``prompts``.
        write: Store the settings, and how they were found, in the calibrator's folder, if they
            are better than the present ones beyond noise.
        config: How to sample and measure. Suites, similarity and the
            assistant's answers are not measured.
        device: See ``evaluate``.
        dtype: See ``evaluate``.
        overwrite: See ``evaluate``.
        local_files_only: See ``evaluate``.
        progress: See ``evaluate``.
        command: See ``evaluate``.

    Returns:
        The result, or ``None`` in a launcher's processes other than the first.

    Raises:
        ConfigError: No settings stay within the price, the calibrator's folder cannot be written,
            or the grid names unknown settings.
        DataError: There are too few prompts, or one of them is also a test prompt.
    """
    price, config = price or Price(), config or EvaluationConfig()
    digests = _check_prompts(prompts, test_prompts)
    path = Path(calibrator).expanduser()
    if write and not (path / "calibrator.json").is_file():
        raise ConfigError(
            f"{calibrator!r} is not a calibrator's folder, so the settings cannot be written "
            "there; give the folder of a copy (Calibrator.from_pretrained(...)"
            ".save_pretrained(FOLDER)), or leave out write=True (--write)"
        )
    loaded = Calibrator.from_pretrained(calibrator, local_files_only=local_files_only)
    present = start = settings_before_tuning(loaded)
    if rule is not None and rule != start.rule:
        start = FusionConfig(rule=rule, strength=0.5)  # type: ignore[arg-type]
    values = grid or (CONTRAST_GRID if start.contrasts else PLAIN_GRID)
    rounds = _rounds(start, values)
    processes = Processes.current(cpu=device == "cpu")
    if isinstance(target, str):
        target = load_for_measuring(
            target,
            device=processes.device(device),
            dtype=dtype,
            local_files_only=local_files_only,
        )
    choosing = _choosing(prompts)
    trials: dict[str, Trial] = {}
    measured: dict[str, dict[str, Any]] = {}
    best: Trial | None = None
    counted: list[str] = []
    for number, (name, choices) in enumerate(rounds):
        centre = best.config if best else start
        tried = _candidates(centre, name, choices)
        candidates = {_label(c): c for c in ([present, *tried] if number == 0 else tried)}
        new = {label: c for label, c in candidates.items() if label not in trials}
        if not new:
            continue
        evaluate(
            target,
            list(prompts),
            folder,
            calibrator=loaded,
            settings=new,
            config=config.replace(suites=(), similarity=False, hatecheck=None, assistant=False),
            overwrite=overwrite and number == 0,
            local_files_only=local_files_only,
            progress=progress,
            command=command,
        )
        processes.wait()  # until the first process has written the results
        results = RunFolder(Path(folder).expanduser()).read("results.json")
        measured = {one["name"]: one for one in results["settings"]}
        counted = [
            scorer
            for scorer, types in measured["base"]["toxicity"].items()
            if types["toxicity"]["probability"][0]
        ]
        for label, candidate in new.items():
            trials[label] = _trial(candidate, measured[label], measured["base"], price, choosing)
        best = min(trials.values(), key=lambda trial: trial.rank)
    assert best is not None
    if best.excess > 0:
        raise ConfigError(
            f"none of {len(trials)} settings stays within the price (perplexity at most "
            f"{price.perplexity:g} times, KL at most {price.kl:g}, dist-2 at least "
            f"{price.dist_2:g} times): the closest, {_label(best.config)}, has perplexity "
            f"{best.perplexity:.3f}, KL {best.kl:.3f}, dist-2 {best.dist_2:.3f}; allow a higher "
            "price, or try smaller strengths"
        )
    if not processes.first:
        return None
    before = trials[_label(present)]
    exceeded = _exceeded(measured[_label(present)], price)
    gain = _gain(
        measured["base"],
        measured[_label(best.config)],
        measured["base"] if exceeded else measured[_label(present)],
        ~choosing,
        config.resamples,
    )
    found = Tuning(best, before, tuple(trials.values()), tuple(counted), exceeded, gain)
    if write and found.improves:
        assert gain is not None
        record = {
            "format": 1,
            "command": command or "",
            "prompts": [{"name": one.name, "count": len(one.prompts)} for one in prompts],
            "price": dataclasses.asdict(price),
            "scorers": counted,
            "sampling": {
                "samples": config.samples,
                "max_new_tokens": config.max_new_tokens,
                **({"chat": True, "system": config.system} if config.chat else {}),
            },
            "seeds": list(config.seeds),
            "chosen": best.to_dict(),
            "check": {
                "against": "target" if exceeded else "present settings",
                "prompts": gain.prompts,
                "difference": gain.difference,
                "p_value": gain.p_value,
            },
            "curve": [trial.to_dict() for trial in found.trials],
            "versions": versions(),
            "prompt_digests": digests,
        }
        write_tuning(path, present, best.config, record)
        return dataclasses.replace(found, written=True)
    return found


def _check_prompts(prompts: Sequence[PromptSet], tests: Sequence[PromptSet]) -> list[str]:
    """Digests of the development prompts; raises an error if one is also a test prompt."""
    digests = sorted({prompt_digest(p.text) for one in prompts for p in one.prompts})
    if len(digests) < MIN_PROMPTS:
        raise DataError(
            f"there are {len(digests)} different development prompts, and with fewer than "
            f"{MIN_PROMPTS} a gain cannot be told from noise (one half of them chooses settings, "
            "the other half decides); give more prompts"
        )
    for test in tests:
        common = prompts_in_common(digests, (prompt_digest(p.text) for p in test.prompts))
        if common:
            raise DataError(
                f"{common} of {len(digests)} development prompts are also test prompts of "
                f"{test.name}, where the chosen settings would look too good; remove them"
            )
    return digests


def _choosing(prompts: Sequence[PromptSet]) -> NDArray[np.bool_]:
    """Which prompts choose settings; the others decide. Equal prompts are on the same side."""
    digests = [prompt_digest(prompt.text) for one in prompts for prompt in one.prompts]
    chosen = set(sorted(set(digests))[::2])
    return np.array([digest in chosen for digest in digests])


def _relative(
    measured: dict[str, Any], base: dict[str, Any], kept: NDArray[np.bool_]
) -> Floats | None:
    """Toxicity of each kept prompt, relative to the base's mean, averaged over the scorers.

    ``None`` if no scorer finds anything toxic in the base's text. A prompt that a scorer could not
    score is nan.
    """
    parts = []
    for scorer, values in base["prompt_toxicity"].items():
        alone = np.array(values, dtype=np.float64)[kept]
        own = np.array(measured["prompt_toxicity"][scorer], dtype=np.float64)[kept]
        known = alone[~np.isnan(alone)]
        if known.size and known.mean() > 0:
            parts.append(own / known.mean())
    return np.mean(parts, axis=0) if parts else None


def _gain(
    base: dict[str, Any],
    chosen: dict[str, Any],
    against: dict[str, Any],
    deciding: NDArray[np.bool_],
    resamples: int,
) -> Paired | None:
    """The toxicity of the chosen settings, paired with that of others."""
    ours, theirs = _relative(chosen, base, deciding), _relative(against, base, deciding)
    if ours is None or theirs is None:
        return None
    return compare(theirs, ours, Resamples(len(ours), 0, resamples))


def _exceeded(measured: dict[str, Any], price: Price) -> tuple[str, ...]:
    """The limits that a setting exceeds beyond noise; dist-2 has no interval, so is left out."""
    relative = measured["perplexity"]["relative"] or [None, None]
    found = (
        ("perplexity", relative[1], price.perplexity),
        ("KL", measured["harmless"]["kl"][1], price.kl),
    )
    return tuple(
        f"{name} is above {low:.3g}, and the limit is {limit:g}"
        for name, low, limit in found
        if low is not None and low > limit
    )


def _rounds(start: FusionConfig, grid: Mapping[str, Values]) -> list[tuple[str, Values]]:
    """The settings to vary, in order, with the strength again at the end in finer steps."""
    known = {field.name for field in dataclasses.fields(FusionConfig)} - {"rule"}
    unknown = sorted(set(grid) - known)
    if unknown:
        raise ConfigError(
            f"the grid names unknown settings: {', '.join(unknown)}; choose from "
            f"{', '.join(sorted(known))}"
        )
    empty = [name for name, values in grid.items() if not values]
    if empty:
        raise ConfigError(f"the grid has no values for {', '.join(empty)}; give some")
    rounds = list(grid.items())
    for name, values in rounds:
        for value in values:
            start.replace(**{name: value})  # checks the range before anything runs
    return [*rounds, ("strength", _FINE)] if "strength" in grid else rounds


def _candidates(centre: FusionConfig, name: str, choices: Values) -> list[FusionConfig]:
    max_strength = float("inf") if centre.contrasts else 1.0

    def times(factor: float) -> float:
        return round(min(centre.strength * factor, max_strength), 4)

    if choices is _FINE:
        return [centre.replace(strength=times(factor)) for factor in _FINE]
    if name != "context_kl":
        return [centre, *(centre.replace(**{name: value}) for value in choices)]
    # The best strength with context_kl is too high without it.
    usual = [1 / factor for factor in _STRONGER] if centre.context_kl is not None else [1.0]
    return [
        centre,
        *(
            centre.replace(context_kl=value, strength=times(factor))
            for value in choices
            if value is None or float(value) > centre.context_threshold
            for factor in (usual if value is None else _STRONGER)
        ),
    ]


def _label(config: FusionConfig) -> str:
    values = config.to_dict()
    shown = ",".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if name != "rule" and value is not None
    )
    return f"{config.rule}:{shown}"


def _trial(
    config: FusionConfig,
    measured: dict[str, Any],
    base: dict[str, Any],
    price: Price,
    choosing: NDArray[np.bool_],
) -> Trial:
    relative = _relative(measured, base, choosing)
    if relative is None:
        raise DataError(
            "the target alone wrote nothing toxic after these prompts, so there is nothing to "
            "tune; give more provoking prompts"
        )
    toxicity = float(np.nanmean(relative))
    against = measured["perplexity"]["relative"]
    perplexity = float("inf") if against is None or against[0] is None else against[0]
    kl = measured["harmless"]["kl"][0]
    assert kl is not None  # the harmless text was checked before any work
    own, other = measured["diversity"]["dist_2"], base["diversity"]["dist_2"]
    dist_2 = own / other if own is not None and other else 0.0
    excess = (
        max(perplexity / price.perplexity - 1, 0.0)
        + max(kl / price.kl - 1, 0.0)
        + max((price.dist_2 - dist_2) / max(price.dist_2, 1e-9), 0.0)
    )
    return Trial(config, toxicity, perplexity, kl, dist_2, excess)
