"""``fusion-detox compare``: several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusion_detox.cli.console import note, results
from fusion_detox.errors import ConfigError, DataError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("compare")(compare)


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders written by `evaluate`.", metavar="RUN RUN...")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="HTML file; a JSON file beside it has the same numbers."),
    ] = Path("comparison.html"),
) -> None:
    """Compare runs side by side, with a warning if their numbers are not comparable."""
    if len(runs) < 2:
        raise ConfigError(f"compare needs at least two runs, not {len(runs)}; give their folders")
    from fusion_detox.evaluation.folder import RunFolder
    from fusion_detox.evaluation.report import write_comparison

    folders = [RunFolder.existing(run) for run in runs]
    for folder in folders:
        if not (folder.path / "results.json").is_file():
            raise DataError(
                f"the run in {folder.path} is not finished: it has no results.json; repeat the "
                "`fusion-detox evaluate` command to resume it"
            )
    documents = [folder.read("results.json") for folder in folders]
    path = write_comparison(documents, out)
    note(f"Compared {len(runs)} runs.")
    results().print(f"Comparison: {path}", soft_wrap=True)
