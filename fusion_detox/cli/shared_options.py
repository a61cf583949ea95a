"""Command-line options that several commands share, and how their values are read."""

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
SAMPLING = "Sampling"

_CALIBRATOR = "Name of a shipped calibrator, a folder, or a hub id."
CalibratorName = Annotated[str, typer.Option(help=_CALIBRATOR)]
CalibratorArgument = Annotated[str, typer.Argument(help=_CALIBRATOR, metavar="CALIBRATOR")]

Target = Annotated[
    str,
    typer.Argument(
        help="A causal language model: a folder (also that of a LoRA adapter), a hub id, or "
        "packaged:NAME (see fetch-target).",
        metavar="TARGET",
    ),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(help="Sampling seed (default: 1). Repeatable."),
]
Harmless = Annotated[
    Path | None,
    typer.Option(
        help="Your own harmless text: JSON Lines with a text field, or one text per line "
        "(default: built-in text).",
        rich_help_panel=MEASURES,
    ),
]
Peers = Annotated[
    Path | None,
    typer.Option(
        help="JSON of `python -m benchmarks.peers`: results of other methods, measured elsewhere, "
        "for a plot of the report (default: those that the run has).",
        rich_help_panel=MEASURES,
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Such as cpu or cuda:1 (default: cuda if available).", rich_help_panel=RUNNING
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Such as float32 or bfloat16 (default: that of the files).", rich_help_panel=RUNNING
    ),
]
Offline = Annotated[
    bool,
    typer.Option("--offline", help="Use only files already downloaded.", rich_help_panel=RUNNING),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=RUNNING),
]
SavedAlignment = Annotated[
    Path | None,
    typer.Option(
        help="Folder that `align --out` wrote, for the aligned rules (default: what `align` "
        "saved for the calibrator and the model)."
    ),
]
Temperature = Annotated[float, typer.Option(help="Sampling temperature.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float,
    typer.Option(help="Nucleus sampling: probability mass kept.", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int, typer.Option(help="Number of tokens kept; 0 keeps all.", rich_help_panel=SAMPLING)
]
Greedy = Annotated[
    bool,
    typer.Option("--greedy", help="Always take the most probable token.", rich_help_panel=SAMPLING),
]
Scorers = Annotated[
    list[str] | None,
    typer.Option(
        "--scorer",
        help="lexical, contextual, detoxify:unbiased, or classifier:MODEL. Repeatable; the first "
        "is the main scorer.",
        rich_help_panel=MEASURES,
    ),
]
System = Annotated[
    str | None,
    typer.Option(help="System prompt of a chat (default: what the template adds, if anything)."),
]
# An evaluation of continuations must not change because a model happens to be a chat model.
EvaluationChat = Annotated[
    bool,
    typer.Option(
        "--chat/--no-chat",
        help="Put the prompts to the model as requests, in its chat template. The default is plain "
        "continuation, also for chat models, because sets such as RealToxicityPrompts hold texts "
        "to continue.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Discard the run in this folder and start over.")
]


def evaluation_config(
    given: dict[str, Any], seeds: list[int] | None, scorers: list[str] | None, **more: Any
) -> EvaluationConfig:
    """The settings that the user gave, with defaults for the rest.

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
    """Reads one prompt set per ``[KIND=]FILE``; raises what ``read_prompt_set`` raises."""
    from fusion_detox.evaluation.prompts.prompt_sets import read_prompt_set

    pairs = [split_kind(source) for source in sources]
    return [read_prompt_set(path, kind=kind, field=field, limit=limit) for kind, path in pairs]


def split_kind(source: str) -> tuple[str | None, str]:
    """Splits ``KIND=FILE``; the kind is ``None`` if it was not given."""
    kind, equals, path = source.partition("=")
    if equals and path and not Path(source).exists() and "/" not in kind:
        return kind, path
    return None, source


def stay_offline(wanted: bool) -> None:
    """Keeps data sets offline too. Call it before importing any library that reads the variable."""
    if wanted:
        os.environ["HF_HUB_OFFLINE"] = "1"


def command_line() -> str:
    """The user's command, with absolute paths shortened to file names."""
    return shlex.join(["fusion-detox", *map(_without_folder, sys.argv[1:])])


def _without_folder(argument: str) -> str:
    head, equals, tail = argument.rpartition("=")
    path = Path(tail).expanduser()
    return f"{head}{equals}{path.name}" if path.is_absolute() and path.name else argument
