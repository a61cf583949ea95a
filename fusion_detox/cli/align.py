"""``fusion-detox align``: learn a matrix from a calibrator's hidden space to a target's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.cli.console import note, quiet_libraries, results, write_json
from fusion_detox.cli.options import with_options


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    options = with_options(AlignmentConfig, "settings", panel="Learning")
    app.command("align")(options(align))


def align(
    calibrator: Annotated[
        str,
        typer.Option(
            help="Name of a shipped calibrator, a folder, or a hub id.", metavar="CALIBRATOR"
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            help="Model to detoxify: a folder or a hub id. Only its embeddings are read.",
            metavar="MODEL",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the alignment (default: beside the calibrator, or in the user's "
            "cache if the calibrator is shipped, downloaded or read-only)."
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Use the settings of arXiv 2506.01266 as defaults."),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub target.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only downloaded files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    settings: dict[str, Any] = {},  # noqa: B006 - replaced by one option per setting
) -> None:
    """Align a calibrator with a target, for the rules aligned and aligned_contrast.

    Prints the retrieval accuracy on held-out tokens.
    """
    config = (AlignmentConfig.paper() if paper else AlignmentConfig()).replace(**settings)

    from fusion_detox.alignment.alignment import align as learn_alignment
    from fusion_detox.alignment.store import save_alignment
    from fusion_detox.calibrator.calibrator import Calibrator

    with quiet_libraries():
        loaded = Calibrator.from_pretrained(calibrator, local_files_only=offline)
        alignment = learn_alignment(
            loaded, target, config=config, revision=revision, local_files_only=offline
        )
        folder = save_alignment(alignment, loaded, out)
    facts = {"folder": str(folder), "fingerprint": alignment.fingerprint, **alignment.facts()}
    if as_json:
        write_json(facts)
    else:
        _print_table(alignment.report)
        note(f"Wrote {folder}")


def _print_table(report: dict[str, Any]) -> None:
    from rich.table import Column, Table

    title = (
        f"Retrieval of {report['held_out_tokens']:,} held-out tokens among "
        f"{report['common_tokens']:,} common ones"
    )
    right = [Column(name, justify="right") for name in ("at 1", "at 10")]
    table = Table("", *right, title=title, title_justify="left")
    for name, part in (
        ("calibrator to target", "to_target"),
        ("target to calibrator", "to_calibrator"),
        ("by chance", "chance"),
    ):
        table.add_row(name, *(f"{report[part][key]:.2%}" for key in ("at_1", "at_10")))
    results().print(table)
