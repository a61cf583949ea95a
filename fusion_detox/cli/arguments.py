"""Arguments that ``evaluate``, ``tune`` and ``rescore`` share, and what becomes of them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_detox.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from fusion_detox.evaluation.prompts.prompt_sets import PromptSet

MEASURES = "Measures"
RUNNING = "Running"

Target = Annotated[
    str, typer.Argument(help="A causal language model: a folder or a hub id.", metavar="TARGET")
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(help="Seed of the sampling; 1 by default, may be given several times."),
]
Harmless = Annotated[
    Path | None,
    typer.Option(
        help="Harmless text of your own: JSON Lines with text, or a text a line; built-in text by "
        "default.",
        rich_help_panel=MEASURES,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Such as cpu or cuda:1; cuda by default where there is one.", rich_help_panel=RUNNING
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="Such as float32 or bfloat16.", rich_help_panel=RUNNING)
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Use downloaded files only.", rich_help_panel=RUNNING)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start the run in this folder anew.")]


def evaluation_config(
    given: dict[str, Any], seeds: list[int] | None, scorers: list[str] | None, **more: Any
) -> EvaluationConfig:
    """The settings that the user gave, and the defaults of the others.

    Raises:
        ConfigError: A setting is out of range.
    """
    values = {**given, **more}
    if seeds is not None:
        values["seeds"] = tuple(seeds)
    if scorers is not None:
        values["scorers"] = tuple(scorers)
    return EvaluationConfig(**values)


def read_prompt_sets(
    sources: Sequence[str], *, field: str | None = None, limit: int | None = None
) -> list[PromptSet]:
    """A set for each ``[KIND=]FILE``; see ``read_prompt_set`` for what is raised."""
    from fusion_detox.evaluation.prompts.prompt_sets import read_prompt_set

    pairs = [split_kind(source) for source in sources]
    return [read_prompt_set(path, kind=kind, field=field, limit=limit) for kind, path in pairs]


def split_kind(source: str) -> tuple[str | None, str]:
    """``KIND=FILE`` in its two parts; the kind is ``None`` where none was given."""
    kind, equals, path = source.partition("=")
    if equals and path and not Path(source).exists() and "/" not in kind:
        return kind, path
    return None, source


def stay_offline(wanted: bool) -> None:
    """Keeps data sets off the network too, before the libraries that read this are imported."""
    if wanted:
        os.environ["HF_HUB_OFFLINE"] = "1"


def command_line() -> str:
    """What the user typed, without where the program and files lie on this machine."""
    return shlex.join(["fusion-detox", *map(_without_folder, sys.argv[1:])])


def _without_folder(argument: str) -> str:
    head, equals, tail = argument.rpartition("=")
    path = Path(tail).expanduser()
    return f"{head}{equals}{path.name}" if path.is_absolute() and path.name else argument
