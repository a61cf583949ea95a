"""``fusion-detox tune``: finds fusion settings within a price, on development prompts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_detox.cli.console import note, progress_bars, quiet_libraries, results
from fusion_detox.cli.options import with_options
from fusion_detox.cli.shared_options import (
    MEASURES,
    Device,
    Dtype,
    EvaluationChat,
    Harmless,
    Offline,
    Overwrite,
    Scorers,
    Seeds,
    System,
    Target,
    command_line,
    evaluation_config,
    read_prompt_sets,
    stay_offline,
)
from fusion_detox.errors import ConfigError
from fusion_detox.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from fusion_detox.evaluation.tuning import Tuning

_PRICE = "Price"


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    options = with_options(EvaluationConfig, "config", panel=MEASURES)
    app.command("tune")(options(tune))


def tune(
    target: Target,
    calibrator: Annotated[str, typer.Option(help="Folder of the calibrator to tune.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the run and its trials.")],
    prompts: Annotated[
        list[str],
        typer.Option(
            help="Development prompts, at least 40: a file or the hub id of a data set, as for "
            "evaluate. One half chooses settings, the other decides. Repeatable.",
            metavar="[KIND=]FILE",
        ),
    ],
    test_prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts for your final results; tuning does not start if one is among --prompts.",
            metavar="[KIND=]FILE",
        ),
    ] = None,
    max_perplexity: Annotated[
        float,
        typer.Option(help="Maximum perplexity relative to the target's.", rich_help_panel=_PRICE),
    ] = 1.05,
    max_kl: Annotated[
        float,
        typer.Option(
            help="Maximum KL(fused ‖ target) on harmless text, in nats per token.",
            rich_help_panel=_PRICE,
        ),
    ] = 0.05,
    min_dist_2: Annotated[
        float,
        typer.Option(help="Minimum dist-2 relative to the target's.", rich_help_panel=_PRICE),
    ] = 0.93,
    rule: Annotated[
        str | None,
        typer.Option(
            help="contrast, product, mixture, aligned or aligned_contrast (default: the "
            "calibrator's)."
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Values to try for one setting, such as strength=1,1.5,2. Repeatable; settings "
            "are varied in the order given (default: a grid over all settings).",
            metavar="NAME=VALUE,...",
        ),
    ] = None,
    write: Annotated[
        bool,
        typer.Option(
            "--write/--no-write",
            help="Store the best settings in the calibrator, if they are better than the present "
            "ones beyond noise. Without it, only say so.",
        ),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(help="Maximum prompts per file, sampled at random.")
    ] = None,
    chat: EvaluationChat = False,
    system: System = None,
    scorer: Scorers = None,
    harmless: Harmless = None,
    seed: Seeds = None,
    device: Device = None,
    dtype: Dtype = None,
    offline: Offline = False,
    overwrite: Overwrite = False,
    config: dict[str, Any] = {},  # noqa: B006 - replaced by one option per setting
) -> None:
    """Find the settings that lower toxicity most within a price.

    Prints every trial, and whether the best settings are better than the present ones beyond noise.
    The calibrator is changed only with --write, and only if they are. A calibrator that was tuned
    before is compared in the settings that it had before.
    """
    chosen = evaluation_config(config, seed, scorer, harmless=harmless, chat=chat, system=system)
    stay_offline(offline)
    values = dict(parse_grid(text) for text in grid) if grid else None

    from fusion_detox.evaluation.tuning import Price
    from fusion_detox.evaluation.tuning import tune as search

    price = Price(max_perplexity, max_kl, min_dist_2)
    with quiet_libraries(), progress_bars() as report:
        found = search(
            target,
            read_prompt_sets(prompts, limit=limit),
            out,
            calibrator=calibrator,
            price=price,
            rule=rule,
            grid=values,
            test_prompts=read_prompt_sets(test_prompts or ()),
            write=write,
            config=chosen,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            local_files_only=offline,
            progress=report,
            command=command_line(),
        )
    if found is None:  # only the first process of a launcher has results
        return
    _show(found)
    if found.written:
        note(f"Updated the settings, the record and the card of {calibrator}.")
        return
    note("The calibrator is unchanged.")
    if found.improves and (Path(calibrator).expanduser() / "calibrator.json").is_file():
        # Everything is measured already, so this takes seconds, unless it discards the run.
        dropped = ("--no-write", "--overwrite")
        kept = [argument for argument in sys.argv[1:] if argument not in dropped]
        note("To store the settings, run:")
        note(f"  {shlex.join(['fusion-detox', *kept, '--write'])}")
    elif found.improves:
        note(
            f"To store the settings, save a copy of the calibrator, "
            f"Calibrator.from_pretrained({calibrator!r}).save_pretrained(FOLDER), then run this "
            "command again with --calibrator FOLDER --write."
        )


def parse_grid(text: str) -> tuple[str, list[float | str | None]]:
    """Splits ``strength=1,1.5`` into a name and its values.

    Raises:
        ConfigError: The text does not have this form.
    """
    name, equals, tail = text.partition("=")
    parts = [part.strip() for part in tail.split(",")]
    if not (name.strip() and equals and all(parts)):
        raise ConfigError(
            f"--grid {text!r} is malformed; write NAME=VALUE,VALUE,..., such as strength=1,1.5,2"
        )
    return name.strip().replace("-", "_"), [_value(part) for part in parts]


def _value(text: str) -> float | str | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _show(found: Tuning) -> None:
    from rich.table import Table

    rows = [trial.to_dict() for trial in found.trials]
    same = {name for name in rows[0] if len({str(row[name]) for row in rows}) == 1}
    columns = [name for name in rows[0] if name not in same - {"toxicity"}]
    table = Table(
        title="Trials (* best, = present). Toxicity, perplexity and dist_2 are relative to the "
        "target; toxicity on the half of the prompts that chooses."
    )
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold", min_width=6)
    for trial, row in zip(found.trials, rows, strict=True):
        mark = "*" * (trial is found.chosen) + "=" * (trial is found.present)
        table.add_row(mark, *(_cell(row[name]) for name in columns))
    results().print(table)
    results().print(found.verdict(), soft_wrap=True)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
