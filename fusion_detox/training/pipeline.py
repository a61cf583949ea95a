"""``train_calibrator``: from text to a calibrator folder, in stages that a killed run resumes."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.probes import Probe, read_probes
from fusion_detox.calibrator.words import read_words
from fusion_detox.config import FusionConfig
from fusion_detox.errors import MissingExtraError, TrainingError
from fusion_detox.files.versions import installed_versions
from fusion_detox.training.config import TrainingConfig
from fusion_detox.training.contrastive.batches import ContrastText, grades_digest
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.data.blocks import byte_lengths, start_id
from fusion_detox.training.data.corpus import (
    Columns,
    Condition,
    Document,
    file_hashes,
    read_documents,
)
from fusion_detox.training.data.pairs import read_pairs
from fusion_detox.training.data.splitting import split
from fusion_detox.training.output import (
    check_replaceable,
    check_same,
    discard,
    exists_already,
    finished_record,
    work_folder,
    writes_output,
)
from fusion_detox.training.request import (
    Sources,
    check_objective,
    check_sources,
    check_texts,
    inherited,
    reference_needed,
)
from fusion_detox.training.truncation import base_and_layers

logger = logging.getLogger(__name__)


@writes_output
def train_calibrator(
    output: str | Path,
    *,
    clean: Sources = (),
    general: Sources = (),
    reference_data: Sources = (),
    base: str | Path | None = None,
    init_from: str | Path | None = None,
    keep_layers: int | None = None,
    calibrator: str | Path | None = None,
    tokenizer: str | Path | None = None,
    columns: Columns | None = None,
    clean_where: Sequence[str] = (),
    pairs: Sources = (),
    config: TrainingConfig | None = None,
    contrast: ContrastiveConfig | None = None,
    fusion: FusionConfig | None = None,
    probes: Iterable[Probe | Mapping[str, Any]] | None = None,
    words: Mapping[str, float] | None = None,
    name: str | None = None,
    notes: dict[str, Any] | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    command: str | None = None,
) -> Calibrator:
    """Train a clean model and its reference, and save them as a calibrator.

    Training from scratch starts with a tokenizer and a base model, both trained on ``general``.
    Then the model forks: the reference continues with ``general`` (or ``reference_data``), the
    clean model with ``clean``. Both take the same number of steps from the same weights, and text
    that is in both corpora takes the same positions. Their difference is then the effect of
    non-toxic training (DExperts, arXiv 2105.03023, where they are called expert and anti-expert;
    arXiv 2506.01266 trains the clean model alone).

    With a contrastive ``config.objective``, the clean model then learns from ``pairs`` which
    wordings of a sentence, or continuations of a prompt, to hold back (after arXiv 2401.08491). A
    KL term keeps it close to the reference on the clean text or, without clean text, on the general
    text. Without clean text, this is the clean model's only training.

    To resume a killed run, call again with the same arguments. If it had finished, the calibrator
    is loaded. Under ``torchrun`` or ``accelerate
    launch``, the blocks of each step are distributed over the processes.

    Args:
        output: The calibrator folder to write; until then, work in progress is kept beside it.
        clean: Non-toxic text; not needed if ``clean_where`` selects it from ``general``.
        general: Text of all kinds.
        reference_data: Text for the reference instead of ``general``, such as toxic text.
        base: A causal language model to start from, by folder or hub id, instead of from scratch.
        init_from: A larger model to start from: its first layers, embeddings, final norm and head
            (arXiv 2506.01266).
        keep_layers: Number of layers to keep of ``init_from``, 3 by default.
        calibrator: A calibrator to continue from, by shipped name, folder or hub id: the
            contrastive objective trains its clean model, and its reference is kept.
        tokenizer: A tokenizer for a model from scratch, by folder or hub id, such as the target's
            own; one is trained by default.
        columns: Names of the fields that hold text, prompts and completions.
        clean_where: Conditions such as ``"label=neutral"`` on the rows of the clean text.
        pairs: Paraphrase sets for a contrastive objective, as ``read_pairs`` reads them.
        config: Sizes, steps, objective and seed.
        contrast: Settings of the contrastive objective.
        fusion: Fusion settings that the calibrator recommends; by default, those of
            ``calibrator``, if given.
        probes: Texts on which each processor checks the calibrator's effect, see
            :class:`~fusion_detox.Calibrator`; by default, those of ``calibrator``, if given.
        words: Words to hold back in any text, with the nats of each, see
            :class:`~fusion_detox.Calibrator`; by default, those of ``calibrator``, if given.
        name: Name on the card; by default, the folder's name.
        notes: Facts for the record and the card, such as ``{"language": "en", "data": [...]}``.
        overwrite: Whether to replace an existing calibrator and discard unfinished work with other
            settings.
        show_progress: Whether to show progress bars on standard error.
        command: The command line that was run, for the record.

    Returns:
        The calibrator.

    Raises:
        CalibratorError: A probe or a listed word is not one, or ``calibrator`` is damaged.
        DataError: The text is empty, malformed or too short.
        DataFileError: Files cannot be read or written, or another process trains ``output``.
        TrainingError: The settings contradict each other or unfinished work at ``output``.
        MissingExtraError: ``accelerate`` is not installed.
        KeyboardInterrupt: The run was interrupted; the work so far is kept.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error
    from fusion_detox.training.contrastive.trainer import ContrastStage
    from fusion_detox.training.data import text_blocks
    from fusion_detox.training.run import Run, claim

    config, columns = config or TrainingConfig(), columns or Columns()
    contrast = contrast or ContrastiveConfig()
    given = None if probes is None else read_probes(probes)
    listed = None if words is None else read_words(words)
    output = Path(output).expanduser()
    work = work_folder(output)
    base, keep_layers = base_and_layers(base, init_from, keep_layers)
    contrastive = check_objective(config, contrast, pairs)
    has_clean = bool(clean or (general and clean_where))
    check_sources(
        general=general,
        reference_data=reference_data,
        base=base,
        tokenizer=tokenizer,
        conditions=clean_where,
        has_clean=has_clean,
        contrastive=contrastive,
        continues=calibrator is not None,
    )
    finished = {} if overwrite else finished_record(output)
    check_replaceable(output, finished, overwrite)
    old = None if calibrator is None else Calibrator.from_pretrained(calibrator)
    if old is not None and old.context_length < config.context_length:
        raise TrainingError(
            f"context_length {config.context_length} is more than {old.context_length}, the "
            f"context_length of the calibrator {calibrator}: reduce it with --context-length"
        )

    state = PartialState(cpu=config.device == "cpu")
    for counted in ("batch_size", "anchors") if contrastive else ("batch_size",):
        if getattr(config, counted) % state.num_processes:
            raise TrainingError(
                f"{counted} {getattr(config, counted)} cannot be divided evenly among "
                f"{state.num_processes} processes: choose a multiple"
            )
    run = Run(
        config,
        base if calibrator is None else calibrator,
        tokenizer,
        work,
        state.num_processes,
        state.is_main_process,
        show_progress,
        keep_layers,
    )
    conditions = [Condition.parse(text) for text in clean_where]
    texts: dict[str, list[Document]] = {
        "general": read_documents(general, columns) if general else [],
        "clean": read_documents(clean or general, columns, conditions) if has_clean else [],
        "reference_data": read_documents(reference_data, columns) if reference_data else [],
    }
    check_texts(texts)
    unique = {one.key: one for one in (read_pairs(pairs) if pairs else [])}
    sets, held_sets = split([*unique.values()], config.held_out)
    fingerprint = run.fingerprint(
        {**texts, "pairs": [*sets, *held_sets]},
        {**contrast.to_dict(), "grades": grades_digest(sets)} if contrastive else {},
    )
    facts = {"name": name or output.name, "settings": config.to_dict(), **(notes or {})}
    if finished:
        check_same(output, finished, {"fingerprint": fingerprint, **facts})
        if state.is_main_process:
            discard(work)
        return _finished(output, fusion, given, listed)
    with state.main_process_first():
        if state.is_main_process:
            claim(work, fingerprint, overwrite)
    splits = {
        label: text_blocks.split_documents(documents, config.held_out)
        for label, documents in texts.items()
    }
    if old is not None:
        model, reference, own_tokenizer = old.clean, reference_needed(old), old.tokenizer
    else:
        with state.main_process_first():
            model, own_tokenizer = run.start(splits)
        reference = model
    bos_id, lengths = start_id(own_tokenizer), byte_lengths(own_tokenizer)
    held_out = {
        label: text_blocks.held_out(own_tokenizer, bos_id, held, config.context_length, lengths)
        for label, (_, held) in splits.items()
        if held
    }
    began = time.time()
    if old is None:
        model, reference = run.language_modelling(model, own_tokenizer, bos_id, splits, held_out)
    measured: dict[str, Any] = {}
    if contrastive:
        text = ContrastText(sets, held_sets, *splits["clean" if has_clean else "general"])
        stage = ContrastStage(run, own_tokenizer, bos_id, text, contrast, reference)
        before = stage.measure(model)
        model = run.stage("contrast", model, stage)
        measured = {
            "objective": config.objective,
            "contrast": {**contrast.to_dict(), **stage.weights},
            "paraphrase_sets": len(sets),
            "held_out_sets": {"before": before, "after": stage.measure(model)},
        }

    record = {
        "command": command or " ".join(sys.argv),
        "name": name or output.name,
        "base_model": None if run.base is None else str(run.base),
        **({} if keep_layers is None else {"kept_layers": keep_layers}),
        "seed": config.seed,
        "settings": config.to_dict(),
        "data_files": {
            label: file_hashes(sources)
            for label, sources in (
                ("general", general),
                ("clean", clean),
                ("reference_data", reference_data),
                ("pairs", pairs),
            )
            if sources
        },
        "conditions": list(clean_where),
        "documents": {label: len(documents) for label, documents in texts.items()},
        "fingerprint": fingerprint,
        "bits_per_byte": {
            label: {
                "clean": round(text.bits_per_byte(model), 4),
                "reference": round(text.bits_per_byte(reference), 4),
            }
            for label, text in held_out.items()
        },
        **measured,
        "curves": run.curves(),
        "processes": state.num_processes,
        "seconds": round(time.time() - began),
        "versions": installed_versions(
            "fusion-detox", "torch", "transformers", "tokenizers", "accelerate"
        ),
        **({} if old is None else inherited(old.record)),
        **(notes or {}),
    }
    made = Calibrator(
        model,
        reference,
        own_tokenizer,
        config=fusion if fusion is not None or old is None else old.config,
        context_length=config.context_length if old is None else old.context_length,
        record=record,
        name=name or output.name,
        probes=old.probes if given is None and old is not None else given or (),
        words=old.words if listed is None and old is not None else listed,
    )
    if state.is_main_process:
        made.save_pretrained(output, dtype=getattr(torch, config.save_dtype))
        discard(work)
    state.wait_for_everyone()
    return made


def _finished(
    output: Path,
    fusion: FusionConfig | None,
    probes: tuple[Probe, ...] | None,
    words: dict[str, float] | None,
) -> Calibrator:
    """The calibrator that an earlier run of the same request has saved."""
    made = Calibrator.from_pretrained(output)
    differs = fusion not in (None, made.config) or probes not in (None, made.probes)
    if differs or words not in (None, made.words):
        raise exists_already(output)
    return made
