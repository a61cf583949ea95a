"""``evaluate``: from a target and prompts to a report; ``rescore``: the same without generating.

A run is a folder. Each stage writes what it makes as it goes and skips what is there, so that the
same call goes on after an interruption, and a later call may add settings and scorers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, DataError
from fusion_detox.evaluation.config import EvaluationConfig
from fusion_detox.evaluation.environment import machine, versions
from fusion_detox.evaluation.folder import RunFolder
from fusion_detox.evaluation.measurer import Measurer
from fusion_detox.evaluation.processes import Processes
from fusion_detox.evaluation.prompts.prompt_sets import Prompt, PromptSet, read_prompt_set
from fusion_detox.evaluation.results import build_results
from fusion_detox.evaluation.samples import SampleFiles
from fusion_detox.evaluation.sampling import Progress, Sampler
from fusion_detox.evaluation.targets import Prepared, Target
from fusion_detox.evaluation.variants import parse_settings
from fusion_detox.files.fingerprints import short_name
from fusion_detox.generation.sampling import jobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.scoring.base import Scorer

logger = logging.getLogger(__name__)


def evaluate(
    target: str | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    prompts: str | PromptSet | Sequence[str] | Sequence[PromptSet],
    folder: str | Path,
    *,
    calibrator: Calibrator | str = "english-16k",
    settings: Iterable[str] | Mapping[str, str | FusionConfig] = ("default", "wordfilter"),
    config: EvaluationConfig | None = None,
    device: str | None = None,
    dtype: str | None = None,
    word_list: Path | None = None,
    overwrite: bool = False,
    local_files_only: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Any] | None:
    """Measures what fusion gains and what it costs, and writes a report.

    Args:
        target: Folder or hub id of a causal language model, or a model with its tokenizer.
        prompts: A file or hub id (see ``read_prompt_set``), a prompt set or several, or prompts.
        folder: Where the run is kept: ``report.html``, ``results.json``, every continuation. A run
            that is there is gone on with.
        calibrator: A calibrator, or the name, folder or hub id of one.
        settings: What to compare with the target alone, see ``parse_settings``.
        config: How to sample and measure.
        device: Of the target; an accelerator by default where there is one.
        dtype: Of the target's weights; that of its files by default.
        word_list: Words of the word filter, one a line; a public list by default.
        overwrite: Forget the run that the folder holds.
        local_files_only: Never contact the hub.
        progress: Told ``(what, done, total)`` as the work goes on.
        command: What to write into the report as the command to reproduce it.

    Returns:
        The content of ``results.json``; ``None`` in all but the first process of several.

    Raises:
        FusionDetoxError: Of the kind and with the remedy of whatever cannot be loaded, read,
            mapped, generated or written.
    """
    config = config or EvaluationConfig()
    path = Path(folder).expanduser()
    chosen = parse_settings(settings)
    sets = _prompt_sets(prompts)
    every = [prompt for one in sets for prompt in one.prompts]
    wanted = jobs([prompt.text for prompt in every], config.samples)
    processes = Processes.current(cpu=device == "cpu")
    loaded = _load(target, calibrator, processes, device, dtype, word_list, local_files_only)
    # All of them before any work: a setting that cannot run must not stop it half-way.
    prepared = [loaded.prepare(setting) for setting in chosen]
    sampler = Sampler(
        loaded.model,
        loaded.tokenizer,
        batch_size=config.batch_size,
        processes=processes,
    )
    encoded = sampler.encode(wanted, config.max_new_tokens)
    measurer = Measurer(loaded, config, device=loaded.model.device, offline=local_files_only)
    scorers = (
        _scorers(config.scorers, loaded.model.device, local_files_only) if processes.first else []
    )
    measurer.check()

    sampling = dataclasses.asdict(config.sampling(config.seeds[0]))
    del sampling["seed"]
    fixed = {
        "target": loaded.about,
        "prompts": [
            {"name": o.name, "file": o.file, "sha256": o.sha256, "count": len(o.prompts)}
            for o in sets
        ],
        "prompt_digest": _digest(every),
        "sampling": sampling,
        "seeds": list(config.seeds),
    }
    claim = RunFolder.claimed(path) if processes.first else contextlib.nullcontext()
    with claim:
        if processes.first:
            if overwrite:
                RunFolder(path).forget()
            RunFolder.create(path, fixed, every)
        processes.wait()
        run = RunFolder.existing(path)
        if processes.first:
            for one in prepared:
                tuned = loaded.prompts_tuned_on(one.setting, [prompt.text for prompt in every])
                run.write(f"settings/{one.stem}.json", {**one.about, "prompts_tuned_on": tuned})
            run.write("asked.json", _asked(run, config, prepared, measurer, loaded, command))
        processes.wait()

        report = progress or _silent
        samplings = [config.sampling(seed) for seed in config.seeds]
        for one in prepared:
            told = functools.partial(report, f"sampling: {one.setting.name}")
            sampler.run(wanted, encoded, samplings, one.processor, run.path, one.stem, report=told)
            one.free()
        measurer.refusals(run, sampler, prepared, report)
        tasks = processes.share(prepared)
        for number, one in enumerate(tasks):
            report("measuring", number, len(tasks))
            rows = SampleFiles(run.path / "samples", one.stem).read()
            measurer.measure(run, one, rows, encoded, every)
            one.free()
        report("measuring", len(tasks), len(tasks))
        processes.wait()
        if not processes.first:
            return None
        return _conclude(run, scorers, run.read("asked.json"), report)


def rescore(
    folder: str | Path,
    *,
    scorers: Sequence[str] | None = None,
    threshold: float | None = None,
    device: str | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Judges the continuations of a run again, without loading the target, and writes the report.

    Args:
        folder: Of a run.
        scorers: The scorers, of which the first is the main one; those of the run by default.
        threshold: See ``EvaluationConfig``; that of the run by default.
        device: Where classifiers run.
        local_files_only: See :func:`evaluate`.
        progress: See :func:`evaluate`.
        command: See :func:`evaluate`.

    Raises:
        DataFileError: The folder holds no run.
        DataError: A file of it is damaged.
        ConfigError: A scorer is unknown, or the threshold out of range.
    """
    run = RunFolder.existing(Path(folder).expanduser())
    with RunFolder.claimed(run.path):
        asked = run.read("asked.json")
        if scorers is not None:
            asked["scorers"] = list(scorers)
        if threshold is not None:
            asked["threshold"] = threshold
        if command:
            asked["commands"] = [*asked["commands"], command]
        EvaluationConfig(scorers=tuple(asked["scorers"]), threshold=asked["threshold"])
        judges = _scorers(asked["scorers"], device, local_files_only)
        return _conclude(run, judges, asked, progress or _silent)


def _scorers(specs: Sequence[str], device: Any, offline: bool) -> list[Scorer]:
    from fusion_detox.scoring import make_scorer

    return [make_scorer(spec, device=device, local_files_only=offline) for spec in specs]


def _conclude(
    run: RunFolder, scorers: Sequence[Scorer], asked: dict[str, Any], report: Progress
) -> dict[str, Any]:
    from fusion_detox.evaluation.report import write_report

    results = build_results(run, asked, scorers, report)
    run.write("asked.json", asked)
    run.write("results.json", results)
    write_report(results, run.path)
    return results


def _load(
    target: str | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    calibrator: Calibrator | str,
    processes: Processes,
    device: str | None,
    dtype: str | None,
    word_list: Path | None,
    offline: bool,
) -> Target:
    options: dict[str, Any] = {
        "calibrator": calibrator,
        "word_list": word_list,
        "local_files_only": offline,
    }
    if isinstance(target, str):
        place = processes.device(device)
        return Target.load(target, device=place, dtype=dtype, **options)
    if device is not None or dtype is not None:
        raise ConfigError("device and dtype are for a target by name; move your model yourself")
    model, tokenizer = target
    return Target(model, tokenizer, short_name(model.name_or_path or "unnamed"), **options)


def _prompt_sets(
    prompts: str | PromptSet | Sequence[str] | Sequence[PromptSet],
) -> list[PromptSet]:
    if isinstance(prompts, str):
        return [read_prompt_set(prompts)]
    if isinstance(prompts, PromptSet):
        return [prompts]
    items = list(prompts)
    if not items:
        raise DataError("there are no prompts to evaluate on")
    texts = [item for item in items if isinstance(item, str)]
    sets = [item for item in items if isinstance(item, PromptSet)]
    if texts and sets:
        raise ConfigError("give prompts as texts or as prompt sets, not both")
    if not texts:
        twice = {one.name for one in sets if [o.name for o in sets].count(one.name) > 1}
        if twice:
            raise ConfigError(
                f"two prompt sets are named {', '.join(sorted(twice))}; rename a file, or say a "
                "subset (rtp:toxic=FILE)"
            )
        return sets
    return [PromptSet.from_texts(texts)]


def _asked(
    run: RunFolder,
    config: EvaluationConfig,
    prepared: Sequence[Prepared],
    measurer: Measurer,
    target: Target,
    command: str | None,
) -> dict[str, Any]:
    """What the report shows: of the settings of earlier calls, those with no newer namesake."""
    before = run.read_if_there("asked.json") or {}
    now = {one.setting.name: one.stem for one in prepared}
    settings = {**before.get("settings", {}), **now}
    return {
        "name": run.path.resolve().name,
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "asked_now": list(now),
        "commands": [
            *dict.fromkeys([*before.get("commands", []), *([command] if command else [])])
        ],
        "settings": settings,
        "scorers": list(config.scorers),
        "threshold": config.threshold,
        "resamples": config.resamples,
        **measurer.about(),
        "versions": versions(),
        "machine": machine(target.model.device),
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    """Tells a list of prompts, in this order, from others."""
    text = json.dumps([[prompt.text, prompt.set_name, prompt.group] for prompt in prompts])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _silent(what: str, done: int, total: int) -> None:
    logger.debug("%s: %d of %d", what, done, total)
