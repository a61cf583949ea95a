"""``fusion-detox rescore``: scores a run's stored continuations with other scorers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusion_detox.cli.console import progress_bars, quiet_libraries
from fusion_detox.cli.evaluate import show
from fusion_detox.cli.shared_options import (
    RUNNING,
    Offline,
    Peers,
    Scorers,
    command_line,
    stay_offline,
)


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("rescore")(rescore)


def rescore(
    run: Annotated[Path, typer.Argument(help="Folder that `evaluate` wrote.", metavar="RUN")],
    scorer: Scorers = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Lowest score that counts as toxic (default: the run's threshold)."),
    ] = None,
    peers: Peers = None,
    device: Annotated[
        str | None, typer.Option(help="Device for classifiers.", rich_help_panel=RUNNING)
    ] = None,
    offline: Offline = False,
) -> None:
    """Score the stored continuations again, without generating text or loading a target."""
    stay_offline(offline)

    from fusion_detox.evaluation.pipeline import rescore as run_rescore

    with quiet_libraries(), progress_bars() as report:
        results = run_rescore(
            run,
            scorers=None if scorer is None else tuple(scorer),
            threshold=threshold,
            peers=peers,
            device=device,
            local_files_only=offline,
            progress=report,
            command=command_line(),
        )
    show(results, run)
