"""``fusion-detox train-calibrator``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_detox.cli.console import quiet_libraries, write_line
from fusion_detox.cli.options import with_options
from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.untrusted import read_json
from fusion_detox.training.config import TrainingConfig
from fusion_detox.training.contrastive.config import ContrastiveConfig

_DATA = "Data"
_PROBES = list, "a list 'probes', each with 'context', 'avoided' and 'kept'"
_WORDS = (
    dict,
    'an object \'words\' that gives each word its nats, such as {"words": {"idiot": 4.0}}',
)
_EPILOG = """
**Examples**

    fusion-detox train-calibrator my-calibrator --general posts.jsonl --clean-where toxic=false

    fusion-detox train-calibrator my-calibrator --base gpt2 --clean clean.txt --general all.txt

    fusion-detox train-calibrator my-calibrator --calibrator english-16k --pairs pairs.jsonl
    --clean clean.txt --objective likelihood-ratio

    torchrun --nproc-per-node 4 -m fusion_detox train-calibrator my-calibrator --general posts.jsonl
    --clean-where label=neutral,neither
"""


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    contrast = with_options(ContrastiveConfig, into="contrast")
    settings = with_options(TrainingConfig, into="settings")
    app.command("train-calibrator", epilog=_EPILOG)(settings(contrast(train_calibrator)))


def train_calibrator(
    output: Annotated[Path, typer.Argument(help="calibrator folder to write")],
    settings: dict[str, Any],
    contrast: dict[str, Any],
    general: Annotated[
        list[str] | None,
        typer.Option(
            help="general text: .txt (blank line between documents), .jsonl, .json, .csv or .tsv "
            "(each also .gz), a folder of these, or a hub id org/name[:split]; repeatable",
            rich_help_panel=_DATA,
        ),
    ] = None,
    clean: Annotated[
        list[str] | None,
        typer.Option(help="non-toxic text, in the same formats; repeatable", rich_help_panel=_DATA),
    ] = None,
    clean_where: Annotated[
        list[str] | None,
        typer.Option(
            help="condition for clean rows, such as label=neutral,neither; applies to --clean, or "
            "to --general if --clean is not given; repeatable, all must hold",
            rich_help_panel=_DATA,
        ),
    ] = None,
    reference_data: Annotated[
        list[str] | None,
        typer.Option(
            help="text to train the reference on instead of --general, for example toxic text",
            rich_help_panel=_DATA,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="causal language model to start from: a folder or a hub id (default: from scratch)"
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="model to take the first layers, embeddings and head from: a folder or a hub id",
            metavar="MODEL",
        ),
    ] = None,
    keep_layers: Annotated[
        int | None, typer.Option(help="number of layers kept by --init-from (default: 3)", min=1)
    ] = None,
    calibrator: Annotated[
        str | None,
        typer.Option(
            help="calibrator to continue from: a shipped name, a folder or a hub id; its clean "
            "model is trained further and its reference is kept; requires a contrastive --objective"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="tokenizer for a model from scratch: a folder or a hub id (default: a new one)"
        ),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            help="paraphrase sets for a contrastive --objective: .jsonl with anchor, positives and "
            "negatives (the format of make-negatives), or ParaDetox or HH-RLHF rows; repeatable",
            rich_help_panel=_DATA,
        ),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="column that holds the text", rich_help_panel=_DATA)
    ] = "text",
    prompt_column: Annotated[
        str | None,
        typer.Option(
            help="column that holds a prompt, read but not learned; requires --completion-column",
            rich_help_panel=_DATA,
        ),
    ] = None,
    completion_column: Annotated[
        str | None,
        typer.Option(
            help="column that holds the completion, which is learned", rich_help_panel=_DATA
        ),
    ] = None,
    domain_column: Annotated[
        str | None,
        typer.Option(
            help="column that names a row's domain; both models see each domain equally often",
            rich_help_panel=_DATA,
        ),
    ] = None,
    fusion: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with the fusion settings to recommend on the calibrator's card"
        ),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with a list 'probes' of texts on which each processor checks the "
            "calibrator's effect, such as another calibrator's calibrator.json (default: those of "
            "--calibrator)"
        ),
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with an object 'words': words to hold back in any text, and the nats "
            "of each (default: those of --calibrator)"
        ),
    ] = None,
    notes: Annotated[
        Path | None,
        typer.Option(help="JSON file with facts for the card: language, license, data (a list)"),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="replace an existing calibrator, or an unfinished run with other settings",
        ),
    ] = False,
) -> None:
    """Train a calibrator (a clean model and its reference) on text.

    If a run is interrupted, run the same command again to resume.
    """
    from fusion_detox.config import FusionConfig
    from fusion_detox.training.data.corpus import Columns
    from fusion_detox.training.pipeline import train_calibrator as train

    with quiet_libraries():
        train(
            output,
            clean=clean or (),
            general=general or (),
            reference_data=reference_data or (),
            base=base,
            init_from=init_from,
            keep_layers=keep_layers,
            calibrator=calibrator,
            tokenizer=tokenizer,
            columns=Columns(text_column, prompt_column, completion_column, domain_column),
            clean_where=clean_where or (),
            pairs=pairs or (),
            config=TrainingConfig(**settings),
            contrast=ContrastiveConfig(**contrast),
            fusion=None if fusion is None else FusionConfig.from_dict(_read_json(fusion)),
            probes=None if probes is None else _read_entry(probes, "probes", _PROBES),
            words=None if words is None else _read_entry(words, "words", _WORDS),
            notes=None if notes is None else _read_json(notes),
            overwrite=overwrite,
            command=shlex.join(["fusion-detox", *sys.argv[1:]]),
        )
    write_line(str(output))


def _read_entry(path: Path, name: str, wanted: tuple[type, str]) -> Any:
    """One entry of a JSON file, of the wanted type, which the message describes."""
    kind, described = wanted
    found = _read_json(path).get(name)
    if not isinstance(found, kind):
        raise DataError(f"{path} must contain {described}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} must contain a single JSON object")
    return found
