"""``train_calibrator``: from text to a calibrator folder, in stages that survive a kill."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusion_detox.calibrator.calibrator import Calibrator
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
from fusion_detox.training.request import (
    Sources,
    check_continuation,
    check_objective,
    check_request,
    check_texts,
    check_uses,
    inherited,
    reference_needed,
)
from fusion_detox.training.truncation import base_and_layers

logger = logging.getLogger(__name__)


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
    name: str | None = None,
    notes: dict[str, Any] | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    command: str | None = None,
) -> Calibrator:
    """Trains the clean model and its reference, and saves them as a calibrator.

    From scratch, a tokenizer and a base model are trained on ``general`` first. Then the model
    forks: the reference goes on with ``general`` (or ``reference_data``), the clean model with
    ``clean``, for the same number of steps, from the same weights and with the same text in the
    same places wherever both corpora hold it. What then differs between them is what non-toxic
    training changed (arXiv 2506.01266 trains the clean model alone; DExperts, arXiv 2105.03023,
    takes a difference of two).

    With a contrastive ``config.objective`` the clean model then learns from ``pairs``, wordings of
    the same or continuations of one prompt, which of them to hold back (after arXiv 2401.08491).
    The clean text, or without it the general text, is where it is kept close to the reference.
    Without clean text that is all its training.

    A killed run goes on where it was when it is started again with the same arguments. Under
    ``torchrun`` or ``accelerate launch`` each step's blocks are spread over the processes.

    Args:
        output: The calibrator folder to write; the work in progress stays beside it until then.
        clean: Non-toxic text; may be left out where ``clean_where`` picks it from ``general``.
        general: Text of all kinds.
        reference_data: Trains the reference on this instead, for example on toxic text.
        base: A causal language model by path or hub id to start from, in place of scratch.
        init_from: A larger one of which the first layers, embeddings, final norm and head are
            taken, likewise (arXiv 2506.01266).
        keep_layers: How many of its layers, 3 by default.
        calibrator: One to go on from, a shipped name, folder or hub id: its clean model is trained
            by the contrastive objective, its reference is kept.
        tokenizer: A tokenizer by path or hub id for a model from scratch, such as the target's
            own; one is trained by default.
        columns: Which fields hold text, prompts and completions.
        clean_where: Conditions like ``"label=neutral"`` on the rows of the clean text.
        pairs: Paraphrase sets for a contrastive objective, as ``read_pairs`` reads them.
        config: Sizes, steps, objective and seed.
        contrast: Settings of the contrastive objective.
        fusion: Recommended fusion settings, written into the card.
        name: Name on the card; the folder's name by default.
        notes: Facts for the record and the card, such as ``{"language": "en", "data": [...]}``.
        overwrite: Replaces an existing calibrator and forgets unfinished work of other settings.
        show_progress: Whether to show progress bars on standard error.
        command: The command line that was run, for the record.

    Raises:
        DataError: The text is empty, broken or too little.
        TrainingError: The settings do not fit each other or unfinished work at ``output``.
        MissingExtraError: ``accelerate`` is not installed.
        KeyboardInterrupt: Interrupted; the work so far is kept for the next start.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error
    from fusion_detox.training.contrastive.trainer import ContrastStage
    from fusion_detox.training.data import text_blocks
    from fusion_detox.training.distributions import Run, claim

    config, columns = config or TrainingConfig(), columns or Columns()
    contrast = contrast or ContrastiveConfig()
    output = Path(output).expanduser()
    work = output.with_name(output.name + ".training")
    base, keep_layers = base_and_layers(base, init_from, keep_layers)
    contrastive = check_objective(config, contrast, pairs)
    has_clean = bool(clean or (general and clean_where))
    if calibrator is not None:
        check_continuation(contrastive, general, reference_data, base, tokenizer)
    else:
        check_request(has_clean or contrastive, general, base, tokenizer)
    check_uses(has_clean, clean_where, reference_data)
    if output.exists() and not overwrite:
        raise TrainingError(
            f"{output} exists already: choose another folder, or replace it with --overwrite"
        )
    old = None if calibrator is None else Calibrator.from_pretrained(calibrator)
    if old is not None and old.context_length < config.context_length:
        raise TrainingError(
            f"context_length {config.context_length} is more than the {old.context_length} tokens "
            f"that the calibrator {calibrator} sees: lower it with --context-length"
        )

    state = PartialState(cpu=config.device == "cpu")
    for counted in ("batch_size", "anchors") if contrastive else ("batch_size",):
        if getattr(config, counted) % state.num_processes:
            raise TrainingError(
                f"{counted} {getattr(config, counted)} cannot be spread evenly over "
                f"{state.num_processes} processes"
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
    with state.main_process_first():
        if state.is_main_process:
            claim(work, fingerprint, overwrite)
    splits = {
        label: text_blocks.split_documents(documents, config.held_out)
        for label, documents in texts.items()
    }
    if old is not None:
        model, reference, words = old.clean, reference_needed(old), old.tokenizer
    else:
        with state.main_process_first():
            model, words = run.start(splits)
        reference = model
    bos_id, lengths = start_id(words), byte_lengths(words)
    held_out = {
        label: text_blocks.held_out(words, bos_id, held, config.context_length, lengths)
        for label, (_, held) in splits.items()
        if held
    }
    began = time.time()
    if old is None:
        model, reference = run.on_texts(model, words, bos_id, splits, held_out)
    measured: dict[str, Any] = {}
    if contrastive:
        text = ContrastText(sets, held_sets, *splits["clean" if has_clean else "general"])
        stage = ContrastStage(run, words, bos_id, text, contrast, reference)
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
        words,
        config=fusion if fusion is not None or old is None else old.config,
        context_length=config.context_length if old is None else old.context_length,
        record=record,
        name=name or output.name,
    )
    if state.is_main_process:
        made.save_pretrained(output, dtype=getattr(torch, config.save_dtype))
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()
    return made
