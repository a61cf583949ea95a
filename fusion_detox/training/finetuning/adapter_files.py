"""The adapter folder that ``finetune`` writes: whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import DataFileError, TrainingError
from fusion_detox.files.atomic import replacing_folder
from fusion_detox.training.finetuning.card import render_adapter_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTINGS = "adapter_config.json"


def check_output(output: Path, overwrite: bool) -> None:
    """Refuses to write over what is there.

    Raises:
        TrainingError: There is something, and either it is not to be replaced or it is no adapter.
    """
    if not output.exists():
        return
    if not overwrite:
        raise TrainingError(
            f"{output} exists already: choose another folder, or replace it with --overwrite"
        )
    if not (output / _SETTINGS).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise TrainingError(
            f"{output} exists and is no adapter, so it is not replaced: give a new folder"
        )


def write_adapter(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    record: dict[str, Any],
    *,
    base: str,
    revision: str | None,
) -> None:
    """Writes adapter, tokenizer, record and card beside ``output``, then puts them in its place.

    Args:
        model: The trained PEFT model.
        tokenizer: The base model's.
        output: The folder; what was there is replaced.
        record: Of the training; JSON-ready.
        base: Where the adapter finds its base model.
        revision: Of the base model.

    Raises:
        DataFileError: It cannot be written, for example because the disk is full.
    """
    from fusion_detox.files.models import make_portable, quiet_transformers

    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = base, revision
    try:
        with replacing_folder(output) as folder:
            with quiet_transformers():
                # The embeddings are not trained; to look for changed ones would ask the hub.
                model.save_pretrained(
                    folder, selected_adapters=["default"], save_embedding_layers=False
                )
                tokenizer.save_pretrained(folder)
            make_portable(folder)
            text = json.dumps(record, indent=2, ensure_ascii=False)
            (folder / "training.json").write_text(text + "\n", encoding="utf-8")
            (folder / "README.md").write_text(render_adapter_card(record), encoding="utf-8")
            for path in folder.glob("*.safetensors"):  # which are written for their owner only
                path.chmod((folder / "README.md").stat().st_mode)
    except OSError as error:
        raise DataFileError(
            f"{output} cannot be written: {error.strerror or error}. The training is kept in "
            f"{output.name}.training; make room and give the same command again."
        ) from error
