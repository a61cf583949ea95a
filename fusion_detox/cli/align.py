"""``fusion-detox align``: learn how a calibrator's hidden states read in a target's space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.cli.console import note, quiet_libraries, results
from fusion_detox.cli.options import with_options

_PAPER = "The settings of arXiv 2506.01266; options given beside it replace them."


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    options = with_options(AlignmentConfig, "settings", panel="Learning")
    app.command("align")(options(align))


def align(
    calibrator: Annotated[
        str,
        typer.Option(
            help="A shipped calibrator's name, a folder or a hub id.", metavar="CALIBRATOR"
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            help="The model to detoxify, a folder or a hub id; its embedding alone is read.",
            metavar="MODEL",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the alignment; beside the calibrator by default, or in the user's "
            "cache where that is shipped or downloaded."
        ),
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help=_PAPER)] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub target.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use downloaded files only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    settings: dict[str, Any] = {},  # noqa: B006 - replaced by an option for each setting
) -> None:
    """Align a calibrator with a target, for the rules aligned and aligned_contrast.

    Retrieval is measured on tokens that the matrix was not learned from.
    """
    start = AlignmentConfig.paper() if paper else AlignmentConfig()
    config = start.replace(**settings)

    from fusion_detox.alignment.alignment import align as learn
    from fusion_detox.alignment.store import save_alignment
    from fusion_detox.calibrator.calibrator import Calibrator

    with quiet_libraries():
        loaded = Calibrator.from_pretrained(calibrator, local_files_only=offline)
        alignment = learn(
            loaded, target, config=config, revision=revision, local_files_only=offline
        )
        folder = save_alignment(alignment, loaded, out)
    facts = {"folder": str(folder), "fingerprint": alignment.fingerprint, **alignment.facts()}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_table(alignment.report)
        note(f"Wrote {folder}")


def _print_table(report: dict[str, Any]) -> None:
    from rich.table import Table

    title = (
        f"Retrieval of {report['held_out_tokens']:,} held-out tokens among "
        f"{report['common_tokens']:,} common ones"
    )
    table = Table(title=title, title_justify="left")
    for name in ("", "at 1", "at 10"):
        table.add_column(name, justify="right" if name else "left")
    for name, part in (
        ("calibrator to target", "to_target"),
        ("target to calibrator", "to_calibrator"),
        ("by chance", "chance"),
    ):
        row = report[part]
        table.add_row(name, f"{row['at_1']:.2%}", f"{row['at_10']:.2%}")
    results().print(table)
