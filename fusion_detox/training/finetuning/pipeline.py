"""``finetune``: train a LoRA adapter from paraphrase sets."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import DataError, MissingExtraError, TrainingError
from fusion_detox.files.adapters import ADAPTER_WEIGHTS, peft_warning_ignored
from fusion_detox.files.versions import installed_versions
from fusion_detox.training.contrastive.batches import (
    ContrastText,
    EncodedSet,
    check_sets,
    encode_sets,
    grades_digest,
)
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.contrastive.measure import MAX_ANCHORS, MAX_BLOCKS, HeldOutAnchors
from fusion_detox.training.data.blocks import Blocks, byte_lengths, pack, start_id, tokenize
from fusion_detox.training.data.corpus import Columns, Document, file_hashes, read_documents
from fusion_detox.training.data.pairs import read_pairs
from fusion_detox.training.data.splitting import split
from fusion_detox.training.finetuning.adapter import (
    adapter_settings,
    check_context,
    check_output,
    load_base_model,
    write_adapter,
)
from fusion_detox.training.finetuning.config import FinetuneConfig
from fusion_detox.training.finetuning.dpo import bos_before, dpo_trainer, preference_rows
from fusion_detox.training.output import (
    check_replaceable,
    check_same,
    discard,
    finished_record,
    work_folder,
    writes_output,
)
from fusion_detox.training.progress import ProgressCallback

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Sources = Sequence[str | Path]
# These settings do not affect the result, so a resumed run may change them.
_FREE = ("device", "save_every", "evaluate_every", "micro_batch_size")


@writes_output
def finetune(
    model: str | Path,
    output: str | Path,
    *,
    pairs: Sources,
    general: Sources = (),
    columns: Columns | None = None,
    config: FinetuneConfig | None = None,
    contrast: ContrastiveConfig | None = None,
    target_modules: Sequence[str] = (),
    dtype: str | None = None,
    four_bit: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    name: str | None = None,
    notes: dict[str, Any] | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    command: str | None = None,
) -> Path:
    """Fine-tune a causal language model with a contrastive objective or DPO, as a LoRA adapter.

    Unlike fusion, this changes what the model itself computes. The model's own weights are not
    changed; the result is a PEFT adapter, which ``peft`` and ``transformers`` load as usual. The
    default objective is the signed margin; the other defaults are the settings of arXiv 2401.08491
    as far as they are known.

    A killed run resumes when it is started again with the same arguments. If it had finished,
    nothing is done. Under ``torchrun`` or
    ``accelerate launch``, the anchors of each step are distributed over the processes.

    Args:
        model: The model to fine-tune, a folder or a hub id.
        output: The adapter folder to write. Unfinished work is kept in ``output`` + ``.training``.
        pairs: Paraphrase sets, as ``read_pairs`` reads them.
        general: General text, used for the KL divergence from the base model and for measuring
            drift.
        columns: The columns of ``general`` that hold text.
        config: Objective, steps, adapter and seed.
        contrast: Settings of the contrastive objectives.
        target_modules: Names of the linear modules to adapt; by default peft's choice for the
            model family, or all except the output layer.
        dtype: Dtype of the base weights in memory, float32 by default.
        four_bit: Hold the base weights in four bits (NF4; requires bitsandbytes and CUDA).
        revision: Branch, tag or commit of a hub model.
        local_files_only: Never contact the hub.
        name: Name on the card; the folder's name by default.
        notes: Facts for the record and the card, such as ``{"language": "en"}``.
        overwrite: Replace an existing adapter and discard unfinished work with other settings.
        show_progress: Show a progress bar on standard error.
        command: The command line, for the record.

    Returns:
        The adapter's folder.

    Raises:
        DataError: The sets or the text are invalid, or there is nothing to learn from.
        DataFileError: A file is missing, the result cannot be written, or another process writes
            it.
        ModelError: The model is not a causal language model.
        ConfigError: The settings do not fit the model.
        TrainingError: The settings contradict each other or unfinished work at ``output``.
        MissingExtraError: ``accelerate``, ``peft`` or ``trl`` is not installed.
        KeyboardInterrupt: The run was interrupted; its work is kept for the next start.
    """
    config, contrast = config or FinetuneConfig(), contrast or ContrastiveConfig()
    state = _processes(config)
    from peft import get_peft_model
    from transformers import set_seed

    from fusion_detox.training.contrastive.trainer import contrastive_trainer
    from fusion_detox.training.run import claim
    from fusion_detox.training.stage import run_trainer

    output = Path(output).expanduser()
    finished = {} if overwrite else finished_record(output)
    check_replaceable(output, finished, overwrite)
    check_output(output)
    if config.batch_size % state.num_processes:
        raise TrainingError(
            f"batch_size {config.batch_size} cannot be divided evenly among {state.num_processes} "
            "processes: choose a multiple"
        )
    if config.objective != "dpo":
        contrast.check_teaches(config.objective)
    work = work_folder(output)
    # An absolute path, so that the adapter finds its base model from any working directory.
    folder = Path(model).expanduser()
    base = str(folder.resolve()) if folder.is_dir() else str(model)
    text = _read(pairs, general, columns or Columns(), config.held_out)
    settings = {
        "finetune": {k: v for k, v in config.to_dict().items() if k not in _FREE},
        "contrast": {**contrast.to_dict(), "grades": grades_digest(text.sets)},
        "model": [base, revision, dtype, four_bit, *target_modules],
    }
    fingerprint = _fingerprint(settings, text)
    if finished:
        facts = {"name": name or output.name, "settings": config.to_dict(), **(notes or {})}
        check_same(output, finished, {"fingerprint": fingerprint, **facts})
        if state.is_main_process:
            discard(work)
        return output
    plain, tokenizer = load_base_model(
        base,
        dtype=dtype,
        four_bit=four_bit,
        revision=revision,
        local_files_only=local_files_only,
    )
    check_context(plain, config.context_length)
    adapter = adapter_settings(plain, config, target_modules)
    sets, blocks, measure = _encode(text, tokenizer, config, contrast)
    rows = []
    if config.objective == "dpo":
        before = bos_before(tokenizer)
        rows = preference_rows(
            text.sets, per_anchor=config.dpo_pairs, seed=config.seed, before=before
        )
    if (
        blocks is None
        and config.objective != "dpo"
        and contrast.anchor_weights(config.objective)[1]
    ):
        logger.warning(
            "there is no general text, so nothing keeps the model from changing on harmless text, "
            "and this change is not measured: give some with --general"
        )
    steps = work / "steps"
    arguments = _arguments(config, steps, len(rows or sets), state.num_processes)
    with state.main_process_first():
        if state.is_main_process:
            claim(work, fingerprint, overwrite)

    began = time.time()
    progress = ProgressCallback(
        config.objective,
        measure,
        every=config.evaluate_every,
        shown=("auc_within", "kl"),
        show=show_progress and state.is_main_process,
        file=steps / "curve.json",
        log_every=min(10, max(arguments["max_steps"] // 10, 1)),
    )
    set_seed(config.seed)
    trainer: Any
    with peft_warning_ignored():
        if config.objective == "dpo":
            trainer = dpo_trainer(
                plain, tokenizer, adapter, arguments, progress, rows=rows, config=config
            )
        else:
            trainer = contrastive_trainer(
                get_peft_model(plain, adapter),
                arguments,
                progress,
                sets=sets,
                general=blocks,
                step_anchors=config.batch_size,
                objective=config.objective,
                contrast=contrast,
                precision=config.precision,
                pad_id=start_id(tokenizer),
            )
        run_trainer(trainer, progress, steps, ADAPTER_WEIGHTS)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if state.is_main_process:
        with trained.disable_adapter():
            base_measures = measure(trained)
        adapted = trained.peft_config["default"].target_modules
        record = {
            "command": command or " ".join(sys.argv),
            "name": name or output.name,
            "base_model": base,
            "revision": revision,
            "objective": config.objective,
            "seed": config.seed,
            "settings": config.to_dict(),
            "contrast": contrast.to_dict(),
            "target_modules": sorted({module.rpartition(".")[2] for module in adapted}),
            "dtype": "nf4" if four_bit else dtype or "float32",
            "data_files": {
                label: file_hashes(sources)
                for label, sources in (("pairs", pairs), ("general", general))
                if sources
            },
            "data_counts": {
                "anchors": len(text.sets),
                "positives": sum(len(one.positives) for one in text.sets),
                "negatives": sum(len(one.negatives) for one in text.sets),
                "held_out_anchors": len(text.held_sets),
                "general_documents": len(text.kl_anchor_text),
                "held_out_general_documents": len(text.held_kl_anchor_text),
            },
            "fingerprint": fingerprint,
            "held_out": {
                "on": measure.sizes,
                "before": base_measures,
                "after": measure(trained),
            },
            "curve": progress.curve,
            "processes": state.num_processes,
            "seconds": round(time.time() - began),
            "versions": installed_versions(
                "fusion-detox", "torch", "transformers", "accelerate", "peft", "trl"
            ),
            **(notes or {}),
        }
        write_adapter(trained, tokenizer, output, record, base=base, revision=revision)
        discard(work)
    state.wait_for_everyone()
    return output


def _processes(config: FinetuneConfig) -> Any:
    """The state of the distributed run, after checking that the extra is installed."""
    for package in ("accelerate", "peft", *(("trl",) if config.objective == "dpo" else ())):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "finetune") from error
    from accelerate import PartialState

    return PartialState(cpu=config.device == "cpu")


def _read(pairs: Sources, general: Sources, columns: Columns, held_out: float) -> ContrastText:
    """Read all text, and split it by content, so no text is on both sides."""
    sets = list({one.key: one for one in read_pairs(pairs)}.values())
    check_sets(sets)
    documents = read_documents(general, columns) if general else []
    return ContrastText(*split(sets, held_out), *split(documents, held_out))


def _fingerprint(settings: dict[str, Any], text: ContrastText) -> str:
    """Hash of everything that determines the result."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for items in (text.sets, text.held_sets, text.kl_anchor_text, text.held_kl_anchor_text):
        for item in items:
            digest.update(item.key.encode())
    return digest.hexdigest()


def _encode(
    text: ContrastText,
    tokenizer: PreTrainedTokenizerBase,
    config: FinetuneConfig,
    contrast: ContrastiveConfig,
) -> tuple[list[EncodedSet], Blocks | None, HeldOutAnchors]:
    """Token ids of the anchors and of the general text, and the evaluation of the held-out part."""
    bos_id, length = start_id(tokenizer), config.context_length
    encode = functools.partial(encode_sets, tokenizer, bos_id=bos_id, context_length=length)
    sets = encode(text.sets)
    if contrast.negatives and not any(one.negatives for one in sets):
        raise DataError(
            "no paraphrase set has a negative: add toxic wordings, or use --negatives 0 with an "
            "--lm-weight to learn from the positives only"
        )

    def blocks(documents: list[Document]) -> Blocks | None:
        return pack(tokenize(tokenizer, documents), bos_id, length) if documents else None

    held = blocks(text.held_kl_anchor_text)
    measure = HeldOutAnchors(
        encode(text.held_sets[:MAX_ANCHORS]),
        held and held.take(range(min(len(held), MAX_BLOCKS))),
        # Only bits per byte need these, and not every tokenizer can provide them.
        byte_lengths(tokenizer) if held else [],
        autocast=config.precision != "float32",
    )
    return sets, blocks(text.kl_anchor_text), measure


def _arguments(config: FinetuneConfig, folder: Path, items: int, processes: int) -> dict[str, Any]:
    """Arguments of ``TrainingArguments`` for a run over ``items`` anchors or pairs."""
    from fusion_detox.training.contrastive.trainer import anchor_arguments

    steps = config.steps or math.ceil(config.epochs * items / config.batch_size)
    per_process = config.batch_size // processes
    # The largest micro-batch that divides a step evenly; its size does not affect the result.
    micro_batch = min(config.micro_batch_size, per_process)
    while per_process % micro_batch:
        micro_batch -= 1
    return {
        **anchor_arguments(folder, config),
        "max_steps": steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": per_process // micro_batch,
        "learning_rate": config.learning_rate,
        "warmup_steps": min(config.warmup_steps, steps // 2),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_gradient_norm,
        "logging_steps": 1,  # the callback averages
    }
