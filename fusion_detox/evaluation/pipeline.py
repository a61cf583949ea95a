"""``evaluate``: from a target and prompts to a report; ``rescore``: the same without generating.

A run is a folder. Each stage writes its results immediately and skips those that exist. The same
call therefore resumes an interrupted run, and a later call may add settings and scorers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError, DataError, MissingExtraError
from fusion_detox.evaluation.config import EvaluationConfig
from fusion_detox.evaluation.folder import RunFolder
from fusion_detox.evaluation.machine import Processes, machine_facts, versions
from fusion_detox.evaluation.measurer import STEP, Measurer
from fusion_detox.evaluation.peers import check_shared_scorers, read_peers
from fusion_detox.evaluation.plan import Plan
from fusion_detox.evaluation.prompts.prompt_sets import Prompt, PromptSet, read_prompt_set
from fusion_detox.evaluation.results import build_results
from fusion_detox.evaluation.samples import SampleFiles
from fusion_detox.evaluation.sampling import Progress, Sampler
from fusion_detox.evaluation.targets import Prepared, Target, load_for_measuring
from fusion_detox.evaluation.variants import parse_variants
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
    peers: str | Path | None = None,
    overwrite: bool = False,
    local_files_only: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Any] | None:
    """Measures the benefit and the cost of fusion, and writes a report.

    Args:
        target: Folder or hub id of a causal language model, or a model with its tokenizer.
        prompts: A file or hub id (see ``read_prompt_set``), one or several prompt sets, or texts.
        folder: The run's folder: ``report.html``, ``results.json`` and every continuation. An
            existing run is resumed.
        calibrator: A calibrator, or its name, folder or hub id.
        settings: The settings to compare with the target alone; see ``parse_variants``.
        config: How to sample and measure.
        device: Device of the target; by default an accelerator if there is one.
        dtype: Dtype of the target's weights. By default that of its files, but float32 on a CPU if
            that fits into half of the memory, because it is faster there.
        word_list: Words of the word filter, one per line; by default a public list.
        peers: Results of other methods, measured elsewhere, for a plot of the report; see
            ``read_peers``. A resumed run keeps those that it has unless others are given.
        overwrite: Delete the run that the folder holds.
        local_files_only: Never contact the hub.
        progress: Called with ``(what, done, total)`` during the work.
        command: The command that the report gives to reproduce the run.

    Returns:
        The content of ``results.json``, or ``None`` in a launcher's processes other than the first.

    Raises:
        FusionDetoxError: Something cannot be loaded, read, mapped, generated or written. The
            error's class and message give the cause and the remedy.
    """
    config = config or EvaluationConfig()
    report = progress or _log_progress
    path = Path(folder).expanduser()

    # Load and check everything before any work, so that a bad setting cannot stop a run halfway.
    _check_extras(config)
    variants = parse_variants(settings)
    others = None if peers is None else read_peers(peers)
    sets = _prompt_sets(prompts)
    every = [prompt for one in sets for prompt in one.prompts]
    processes = Processes.current(cpu=device == "cpu")
    if isinstance(target, str):
        place = processes.device(device)
        model, tokenizer = load_for_measuring(
            target, device=place, dtype=dtype, local_files_only=local_files_only
        )
    elif device is not None or dtype is not None:
        raise ConfigError(
            "device and dtype apply only to a target given by name; move your model yourself"
        )
    else:
        model, tokenizer = target
    loaded = Target(
        model,
        tokenizer,
        short_name(target if isinstance(target, str) else model.name_or_path),
        calibrator=calibrator,
        word_list=word_list,
        local_files_only=local_files_only,
    )
    prepared = [loaded.prepare(variant) for variant in variants]
    sampler = Sampler(model, tokenizer, batch_size=config.batch_size, processes=processes)
    wanted = jobs(
        [prompt.text for prompt in every], config.samples, chat=config.chat, system=config.system
    )
    encoded = sampler.encode(wanted, config.max_new_tokens)
    measurer = Measurer(loaded, config, device=model.device, offline=local_files_only)
    scorers = (
        _make_scorers(config.scorers, model.device, local_files_only) if processes.first else []
    )
    if others is not None and scorers:
        check_shared_scorers(others, [scorer.name for scorer in scorers])
    measurer.check()

    claim = RunFolder.claimed(path) if processes.first else contextlib.nullcontext()
    with claim:
        if processes.first:
            if overwrite:
                RunFolder(path).forget()
            run = RunFolder.create(path, _fixed_facts(loaded, sets, every, config), every)
            for one in prepared:
                tuned = loaded.prompts_tuned_on(one.variant, [prompt.text for prompt in every])
                run.write(f"settings/{one.stem}.json", {**one.about, "prompts_tuned_on": tuned})
            about = _run_config(run, config, prepared, measurer, loaded, others, command)
            run.write_config(about)
        processes.wait()
        run = RunFolder.existing(path)

        samplings = [config.sampling(seed) for seed in config.seeds]
        tokens = len(wanted) * len(samplings) * config.max_new_tokens
        sampling = {f"sampling: {one.variant.name}": STEP * tokens for one in prepared}
        plan = Plan({**sampling, **measurer.steps(prepared)}, report)
        own = processes.share(prepared)
        for one in prepared:
            told = plan.start(f"sampling: {one.variant.name}")
            sampler.run(wanted, encoded, samplings, one.processor, path, one.stem, report=told)
            if processes.count == 1:
                _measure(measurer, run, one, encoded, every)
            one.free()
            # A run that is stopped later has a report nevertheless.
            _write_unfinished(run, scorers, report, plan)
        if processes.count > 1:
            for one in own:
                _measure(measurer, run, one, encoded, every)
        measurer.compare(run, own, plan)
        _write_unfinished(run, scorers, report, plan)
        measurer.answer(run, sampler, prepared, plan)
        processes.wait()
        if not processes.first:
            return None
        return _write_results(run, scorers, run.read_config(), report)


def rescore(
    folder: str | Path,
    *,
    scorers: Sequence[str] | None = None,
    threshold: float | None = None,
    peers: str | Path | None = None,
    device: str | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Scores a run's continuations again, without loading the target, and writes the report.

    Args:
        folder: A run's folder.
        scorers: The scorers; the first is the main one. By default, those of the run.
        threshold: See ``EvaluationConfig``; by default, that of the run.
        peers: See :func:`evaluate`; by default, those of the run.
        device: Device of the classifiers.
        local_files_only: Never contact the hub.
        progress: See :func:`evaluate`.
        command: See :func:`evaluate`.

    Returns:
        The content of ``results.json``.

    Raises:
        DataFileError: The folder holds no run.
        DataError: A file of the run, or that of the peers, is damaged.
        ConfigError: A scorer is unknown, or the threshold is out of range.
    """
    others = None if peers is None else read_peers(peers)
    run = RunFolder.existing(Path(folder).expanduser())
    with RunFolder.claimed(run.path):
        config = run.read_config()
        if scorers is not None:
            config["scorers"] = list(scorers)
        if threshold is not None:
            config["threshold"] = threshold
        if command:
            config["commands"] = [*config["commands"], command]
        EvaluationConfig(scorers=tuple(config["scorers"]), threshold=config["threshold"])
        made = _make_scorers(config["scorers"], device, local_files_only)
        if others is not None:
            check_shared_scorers(others, [scorer.name for scorer in made])
            config["peers"] = others
        unfinished = None
        if (run.path / "results.json").is_file():
            unfinished = run.read("results.json").get("unfinished")
        return _write_results(run, made, config, progress or _log_progress, unfinished)


def _prompt_sets(
    prompts: str | PromptSet | Sequence[str] | Sequence[PromptSet],
) -> list[PromptSet]:
    if isinstance(prompts, str):
        return [read_prompt_set(prompts)]
    if isinstance(prompts, PromptSet):
        return [prompts]
    items = list(prompts)
    if not items:
        raise DataError("there are no prompts to evaluate on; give at least one")
    texts = [item for item in items if isinstance(item, str)]
    sets = [item for item in items if isinstance(item, PromptSet)]
    if texts and sets:
        raise ConfigError("give prompts as texts or as prompt sets, not both")
    if texts:
        return [PromptSet.from_texts(texts)]
    names = [one.name for one in sets]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"two prompt sets are named {', '.join(repeated)}; rename a file, or name a subset "
            "(rtp:toxic=FILE)"
        )
    return sets


def _check_extras(config: EvaluationConfig) -> None:
    """Name a missing package before the target is loaded, not when the results are written."""
    packages = ["matplotlib", *(["sacrebleu"] if config.samples > 1 else [])]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "evaluate")


def _make_scorers(specs: Sequence[str], device: Any, offline: bool) -> list[Scorer]:
    from fusion_detox.scoring import make_scorer

    return [make_scorer(spec, device=device, local_files_only=offline) for spec in specs]


def _fixed_facts(
    target: Target, sets: Sequence[PromptSet], every: Sequence[Prompt], config: EvaluationConfig
) -> dict[str, Any]:
    """The content of ``run.json``: what all continuations of the run share."""
    sampling = dataclasses.asdict(config.sampling(config.seeds[0]))
    del sampling["seed"]
    ordered = json.dumps([[prompt.text, prompt.set_name, prompt.group] for prompt in every])
    digest = hashlib.sha256(ordered.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return {
        "target": target.about,
        "prompts": [
            {"name": o.name, "file": o.file, "sha256": o.sha256, "count": len(o.prompts)}
            for o in sets
        ],
        "prompt_digest": digest,
        "sampling": sampling,
        "seeds": list(config.seeds),
        **({"chat": target.chat(config.system)} if config.chat else {}),
    }


def _run_config(
    run: RunFolder,
    config: EvaluationConfig,
    prepared: Sequence[Prepared],
    measurer: Measurer,
    target: Target,
    peers: Mapping[str, Any] | None,
    command: str | None,
) -> dict[str, Any]:
    """The content of ``config.json``; settings of earlier calls stay unless a name is reused."""
    before = run.read_config() if run.has_config() else {}
    now = {one.variant.name: one.stem for one in prepared}
    commands = [*before.get("commands", []), *([command] if command else [])]
    return {
        "name": run.path.resolve().name,
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "asked_now": list(now),
        "commands": list(dict.fromkeys(commands)),
        "settings": {**before.get("settings", {}), **now},
        "scorers": list(config.scorers),
        "threshold": config.threshold,
        "resamples": config.resamples,
        "sizes": config.sizes,
        "peers": before.get("peers") if peers is None else peers,
        **measurer.about,
        "versions": versions(),
        "machine": machine_facts(target.model.device),
    }


def _measure(
    measurer: Measurer,
    run: RunFolder,
    one: Prepared,
    encoded: Mapping[int, Sequence[int]],
    prompts: Sequence[Prompt],
) -> None:
    samples = SampleFiles(run.path / "samples", one.stem).read()
    measurer.measure(run, one, samples, encoded, prompts)


def _write_unfinished(
    run: RunFolder, scorers: Sequence[Scorer], report: Progress, plan: Plan
) -> None:
    """Writes what is known so far, in the process that has the scorers."""
    if scorers and plan.worked:
        _write_results(run, scorers, run.read_config(), report, str(plan))
        plan.worked = False


def _write_results(
    run: RunFolder,
    scorers: Sequence[Scorer],
    config: dict[str, Any],
    report: Progress,
    unfinished: str | None = None,
) -> dict[str, Any]:
    from fusion_detox.evaluation.report import write_report

    results = build_results(run, config, scorers, report, unfinished)
    run.write_config(config)
    run.write("results.json", results)
    write_report(results, run.path)
    return results


def _log_progress(what: str, done: int, total: int) -> None:
    logger.debug("%s: %d of %d", what, done, total)
