"""``fusion-detox rescore``: other scorers on the continuations that a run has stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusion_detox.cli.arguments import RUNNING, Offline, command_line, stay_offline
from fusion_detox.cli.console import quiet_libraries
from fusion_detox.cli.evaluate import progress_bars, show


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("rescore")(rescore)


def rescore(
    run: Annotated[Path, typer.Argument(help="Folder that `evaluate` wrote.", metavar="RUN")],
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="lexical, contextual, detoxify:unbiased or classifier:MODEL; the "
            "first is the main one. May be given several times; by default those of the run.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Score from which a continuation counts as toxic; that of the run."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where classifiers run.", rich_help_panel=RUNNING)
    ] = None,
    offline: Offline = False,
) -> None:
    """Judge the stored continuations again; no text is generated, no target is loaded."""
    stay_offline(offline)

    from fusion_detox.evaluation.pipeline import rescore as again

    with quiet_libraries(), progress_bars() as report:
        results = again(
            run,
            scorers=None if scorer is None else tuple(scorer),
            threshold=threshold,
            device=device,
            local_files_only=offline,
            progress=report,
            command=command_line(),
        )
    show(results, run)
