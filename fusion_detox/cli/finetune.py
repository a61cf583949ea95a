"""``fusion-detox finetune``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_detox.cli.console import note, quiet_libraries, write_line
from fusion_detox.cli.options import with_options
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.finetuning.config import FinetuneConfig

_DATA = "Data"
_MODEL = "Model"
_EPILOG = """
**Examples**

    fusion-detox finetune gpt2 my-adapter --pairs pairs.jsonl --general all.txt

    fusion-detox finetune gpt2 my-adapter --pairs pairs.jsonl
    --objective contrastive-perplexity

    torchrun --nproc-per-node 2 -m fusion_detox finetune gpt2 my-adapter --pairs pairs.jsonl
    --objective dpo

    fusion-detox evaluate my-adapter --prompts prompts.jsonl --out run
"""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    contrast = with_options(ContrastiveConfig, into="contrast")
    settings = with_options(FinetuneConfig, into="settings")
    app.command("finetune", epilog=_EPILOG)(contrast(settings(finetune)))


def finetune(
    model: Annotated[
        str,
        typer.Argument(
            help="causal language model to fine-tune: a folder, a hub id, or packaged:NAME",
            metavar="MODEL",
        ),
    ],
    output: Annotated[Path, typer.Argument(help="adapter folder to write", metavar="OUT")],
    settings: dict[str, Any],
    contrast: dict[str, Any],
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            help="paraphrase sets (required): .jsonl with anchor, positives and negatives (as "
            "make-negatives writes), or ParaDetox or HH-RLHF rows; a file, a folder or a hub id; "
            "repeatable",
            rich_help_panel=_DATA,
        ),
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option(
            help="general text, on which the adapted model should change little (signed-margin and "
            "likelihood-ratio keep it near the base there); repeatable",
            rich_help_panel=_DATA,
        ),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="column of --general that holds text", rich_help_panel=_DATA)
    ] = "text",
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="linear module to adapt, such as q_proj; repeatable (default: peft's choice)",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="dtype of the base weights, such as bfloat16 (default: float32)",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    four_bit: Annotated[
        bool,
        typer.Option(
            "--four-bit",
            help="load the base weights in 4-bit precision (requires bitsandbytes and CUDA)",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="branch, tag or commit of a hub model", rich_help_panel=_MODEL),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="use downloaded files only", rich_help_panel=_MODEL)
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="replace an existing adapter, or an unfinished run with other settings",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the results as one JSON object")
    ] = False,
) -> None:
    """Fine-tune a model on paraphrase sets, as a LoRA adapter.

    The other commands take the adapter's folder as a model. Training does not measure how toxic the
    model's text is; evaluate does. If a run is interrupted, run the same command again to resume.
    """
    if not pairs:
        raise typer.BadParameter("give at least one file of paraphrase sets", param_hint="--pairs")
    config, contrastive = FinetuneConfig(**settings), ContrastiveConfig(**contrast)
    from fusion_detox.training.data.corpus import Columns
    from fusion_detox.training.finetuning.pipeline import finetune as train

    with quiet_libraries():
        folder = train(
            model,
            output,
            pairs=pairs,
            general=general or (),
            columns=Columns(text_column),
            config=config,
            contrast=contrastive,
            target_modules=target_modules or (),
            dtype=dtype,
            four_bit=four_bit,
            revision=revision,
            local_files_only=offline,
            overwrite=overwrite,
            command=shlex.join(["fusion-detox", *sys.argv[1:]]),
        )
    measures = json.loads((folder / "training.json").read_text(encoding="utf-8"))["held_out"]
    if as_json:
        write_line(json.dumps({"adapter": str(folder), **measures}))
        return
    for key, after in measures["after"].items():
        note(f"{key}: {measures['before'][key]} -> {after}")
    write_line(str(folder))
