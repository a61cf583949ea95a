"""``finetune``: a LoRA adapter that makes a model itself less toxic, from paraphrase sets."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import MissingExtraError, TrainingError
from fusion_detox.files.versions import installed_versions
from fusion_detox.training.contrastive.batches import grades_digest
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.data.corpus import Columns, file_hashes
from fusion_detox.training.finetuning.adapter_files import check_output, write_adapter
from fusion_detox.training.finetuning.config import FinetuneConfig
from fusion_detox.training.finetuning.data import EncodedData, FinetuneData, Sources

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.training.progress import ProgressCallback

logger = logging.getLogger(__name__)
# What does not change the result may change between two starts of one run.
_FREE = ("device", "save_every", "evaluate_every", "micro_batch_size")


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
    """Fine-tunes a causal language model by contrastive perplexity, a signed margin or DPO.

    Unlike fusion, this changes what the model itself computes. The model's own weights stay as
    they are; the change is a PEFT adapter, which ``peft`` and ``transformers`` load as usual. The
    defaults are the settings of arXiv 2401.08491 as far as they are known.

    A killed run goes on where it was when it is started again with the same arguments. Under
    ``torchrun`` or ``accelerate launch`` each step's anchors are spread over the processes.

    Args:
        model: The model to fine-tune, a folder or a hub id.
        output: The adapter folder to write; the work in progress stays beside it until then.
        pairs: Paraphrase sets, as ``read_pairs`` reads them.
        general: Text of all kinds, for the KL divergence from the base model and for measuring
            drift.
        columns: Which fields of ``general`` hold text.
        config: Objective, steps, adapter and seed.
        contrast: Settings of the two contrastive objectives.
        target_modules: Names of the linear modules to adapt; by default peft's choice for the
            family, else all of them but the output layer.
        dtype: Of the base weights in memory, float32 by default.
        four_bit: Holds the base weights in four bits (NF4; needs bitsandbytes and CUDA).
        revision: Branch, tag or commit of a hub model.
        local_files_only: Never contact the hub.
        name: Name on the card; the folder's name by default.
        notes: Facts for the record and the card, such as ``{"language": "en"}``.
        overwrite: Replaces an existing adapter and forgets unfinished work of other settings.
        show_progress: Whether to show a progress bar on standard error.
        command: The command line that was run, for the record.

    Returns:
        The adapter's folder.

    Raises:
        DataError: The sets or the text are broken, or there is nothing to learn from.
        DataFileError: A file is missing, or the result cannot be written.
        ModelError: The model is no causal language model.
        ConfigError: The settings do not fit the model.
        TrainingError: The settings do not fit each other or unfinished work at ``output``.
        MissingExtraError: ``accelerate``, ``peft`` or ``trl`` is not installed.
        KeyboardInterrupt: Interrupted; the work so far is kept for the next start.
    """
    config, contrast = config or FinetuneConfig(), contrast or ContrastiveConfig()
    state = _processes(config)
    from fusion_detox.training.finetuning.model import (
        adapter_settings,
        check_context,
        load_start,
        peft_of_its_time,
    )
    from fusion_detox.training.progress import ProgressCallback
    from fusion_detox.training.run import claim

    output = Path(output).expanduser()
    check_output(output, overwrite)
    _check_settings(config, contrast, state.num_processes)
    work = output.with_name(output.name + ".training")
    base = _absolute(model)
    data = FinetuneData.read(pairs, general, columns or Columns(), config.held_out)
    settings = {
        "finetune": {k: v for k, v in config.to_dict().items() if k not in _FREE},
        "contrast": {**contrast.to_dict(), "grades": grades_digest(data.sets)},
        "model": [base, revision, dtype, four_bit, *target_modules],
    }
    fingerprint = data.fingerprint(settings)
    start, tokenizer = load_start(
        base,
        dtype=dtype,
        four_bit=four_bit,
        revision=revision,
        local_files_only=local_files_only,
    )
    check_context(start, config.context_length)
    adapter = adapter_settings(start, config, target_modules)
    encoded = EncodedData(data, tokenizer, config, contrast)
    with state.main_process_first():
        if state.is_main_process:
            claim(work, fingerprint, overwrite)

    began = time.time()
    measure = encoded.measure()
    watch = ProgressCallback(
        config.objective,
        measure,
        every=config.evaluate_every,
        shown=("auc_within", "kl"),
        show=show_progress and state.is_main_process,
        file=work / "steps" / "curve.json",
    )
    with peft_of_its_time():
        trained = _train(
            start, tokenizer, adapter, data, encoded, watch, work / "steps", state.num_processes
        )
    if state.is_main_process:
        with trained.disable_adapter():
            before = measure(trained)
        record = {
            "command": command or " ".join(sys.argv),
            "name": name or output.name,
            "base_model": base,
            "revision": revision,
            "objective": config.objective,
            "seed": config.seed,
            "settings": config.to_dict(),
            "contrast": contrast.to_dict(),
            "target_modules": sorted(
                {name.rpartition(".")[2] for name in trained.peft_config["default"].target_modules}
            ),
            "dtype": "nf4" if four_bit else dtype or "float32",
            "data_files": {
                label: file_hashes(sources)
                for label, sources in (("pairs", pairs), ("general", general))
                if sources
            },
            "data_counts": data.counts(),
            "fingerprint": fingerprint,
            "held_out": {"before": before, "after": measure(trained)},
            "curve": watch.curve,
            "processes": state.num_processes,
            "seconds": round(time.time() - began),
            "versions": installed_versions(
                "fusion-detox", "torch", "transformers", "accelerate", "peft", "trl"
            ),
            **(notes or {}),
        }
        write_adapter(trained, tokenizer, output, record, base=base, revision=revision)
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()
    return output


def _train(
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: LoraConfig,
    data: FinetuneData,
    encoded: EncodedData,
    watch: ProgressCallback,
    folder: Path,
    world_size: int,
) -> Any:
    """The PEFT model after training, or after what was left of it."""
    from peft import get_peft_model
    from transformers import set_seed

    from fusion_detox.training.contrastive.trainer import contrastive_trainer
    from fusion_detox.training.finetuning.dpo import bos_before, dpo_trainer, preference_rows
    from fusion_detox.training.finetuning.trainer import ADAPTER_WEIGHTS, training_arguments
    from fusion_detox.training.stage import run_trainer

    config = encoded.config
    set_seed(config.seed)
    trainer: Any
    if config.objective == "dpo":
        rows = preference_rows(
            data.sets,
            per_anchor=config.dpo_pairs,
            seed=config.seed,
            before=bos_before(tokenizer),
        )
        steps = _steps(config, len(rows))
        trainer = dpo_trainer(
            start,
            tokenizer,
            adapter,
            rows,
            folder,
            config,
            watch,
            steps=steps,
            world_size=world_size,
        )
    else:
        steps = _steps(config, len(encoded.sets))
        model: Any = get_peft_model(start, adapter)
        trainer = contrastive_trainer(
            model,
            training_arguments(folder, config, steps=steps, world_size=world_size),
            encoded.draws(steps),
            watch,
            objective=config.objective,
            contrast=encoded.contrast,
            precision=config.precision,
            pad_id=encoded.bos_id,
        )
    run_trainer(trainer, watch, folder, ADAPTER_WEIGHTS)
    return trainer.accelerator.unwrap_model(trainer.model)


def _steps(config: FinetuneConfig, items: int) -> int:
    return config.steps or max(math.ceil(config.epochs * items / config.batch_size), 1)


def _processes(config: FinetuneConfig) -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("accelerate", "finetune") from error
    try:
        import peft  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise MissingExtraError("peft", "finetune") from error
    if config.objective == "dpo":
        try:
            import trl  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("trl", "finetune") from error
    return PartialState(cpu=config.device == "cpu")


def _check_settings(config: FinetuneConfig, contrast: ContrastiveConfig, processes: int) -> None:
    if config.batch_size % processes:
        raise TrainingError(
            f"batch_size {config.batch_size} cannot be spread evenly over {processes} processes"
        )
    if config.objective != "dpo":
        contrast.check_teaches(config.objective)


def _absolute(model: str | Path) -> str:
    """A folder's full path, by which the adapter finds it from anywhere; else the hub id."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else str(model)
