"""``fusion-detox evaluate``: what fusion gains and what it costs, in one report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_detox.cli.arguments import (
    MEASURES,
    Device,
    Dtype,
    Harmless,
    Offline,
    Overwrite,
    Seeds,
    Target,
    command_line,
    evaluation_config,
    read_prompt_sets,
    stay_offline,
)
from fusion_detox.cli.console import messages, note, quiet_libraries
from fusion_detox.cli.options import with_options
from fusion_detox.evaluation.config import SUITES, EvaluationConfig

if TYPE_CHECKING:
    from fusion_detox.evaluation.sampling import Progress

_PROMPTS = "Prompts"


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    options = with_options(EvaluationConfig, "config", panel=MEASURES)
    app.command("evaluate")(options(evaluate))


def evaluate(
    target: Target,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder of the run; gone on with where it holds a part of it."
        ),
    ],
    prompts: Annotated[
        list[str],
        typer.Option(
            help="A file or a datasets hub id, RealToxicityPrompts for instance. A kind before it "
            "says how to read it: rtp:challenging=FILE. May be given several times.",
            metavar="[KIND=]FILE",
            rich_help_panel=_PROMPTS,
        ),
    ],
    prompt_field: Annotated[
        str | None,
        typer.Option(help="Field of the prompt in JSON Lines.", rich_help_panel=_PROMPTS),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Prompts of each file at most, drawn.", rich_help_panel=_PROMPTS),
    ] = None,
    calibrator: Annotated[
        str, typer.Option(help="A shipped calibrator's name, a folder or a hub id.")
    ] = "english-16k",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="default (the calibrator's own), wordfilter, or a rule with changes such as "
            "contrast:strength=2,threshold=0.3, mixture:strength=0.3 or aligned:strength=0.1; "
            "RULE@CALIBRATOR takes another calibrator. May be given several times; by default: "
            "default and wordfilter.",
            metavar="SETTING",
        ),
    ] = None,
    seed: Seeds = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="lexical, contextual, detoxify:unbiased or classifier:MODEL; the "
            "first is the main one. May be given several times; by default lexical and contextual.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    similarity: Annotated[
        bool,
        typer.Option("--similarity/--no-similarity", help="Measure it.", rich_help_panel=MEASURES),
    ] = True,
    harmless: Harmless = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Built-in texts for side effects ({', '.join(SUITES)}; none for no suite); all "
            "by default.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    hatecheck: Annotated[
        Path | None,
        typer.Option(
            help="HateCheck's file: its non-hateful cases show over-blocking.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    word_list: Annotated[
        Path | None,
        typer.Option(help="Words of the word filter, one a line; a public list by default."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    offline: Offline = False,
    overwrite: Overwrite = False,
    config: dict[str, Any] = {},  # noqa: B006 - replaced by an option for each of its settings
) -> None:
    """Measure toxicity, fluency, diversity, side effects and cost, with and without fusion.

    Writes OUT/report.html, OUT/results.json and every continuation. An interrupted run is gone on
    with by the same command. Under `accelerate launch` or `torchrun` the work is shared.
    """
    if suite is not None:
        config = {**config, "suites": tuple(name for name in suite if name != "none")}
    chosen = evaluation_config(
        config, seed, scorer, similarity=similarity, harmless=harmless, hatecheck=hatecheck
    )
    stay_offline(offline)

    from fusion_detox.evaluation.pipeline import evaluate as run

    sets = read_prompt_sets(prompts, field=prompt_field, limit=limit)
    with quiet_libraries(), progress_bars() as report:
        results = run(
            target,
            sets,
            out,
            calibrator=calibrator,
            settings=setting or ("default", "wordfilter"),
            config=chosen,
            device=device,
            dtype=dtype,
            word_list=word_list,
            overwrite=overwrite,
            local_files_only=offline,
            progress=report,
            command=command_line(),
        )
    if results is not None:  # the other processes of a launcher have nothing to say
        show(results, out)


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar for each kind of work, on standard error; lines of text where that is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = messages()
    bars: dict[str, Any] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=False,
    ) as shown:

        def report(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=total)
                if not console.is_terminal:
                    note(what)
            shown.update(bars[what], completed=done, total=total)

        try:
            yield report
        except KeyboardInterrupt:
            note("What was written is kept; the same command goes on from there.")
            raise


def show(results: dict[str, Any], folder: Path) -> None:
    """The headline numbers as a table, and where the report is."""
    from rich.markup import escape
    from rich.table import Table

    from fusion_detox.cli.console import results as output

    scorers = list(results["scorers"])
    table = Table(title=escape(f"{results['target']['name']}, {describe_prompts(results)}"))
    table.add_column("setting", overflow="fold", min_width=12)
    for scorer in scorers:
        table.add_column(f"P(toxic)\n{scorer}", justify="right", no_wrap=True)
    for name in ("perplexity", "dist-2", "KL on\nharmless text", "tokens\na second"):
        table.add_column(name, justify="right")
    for one in results["settings"]:
        cells = [escape(one["name"])]
        for scorer in scorers:
            toxicity = one["toxicity"].get(scorer, {}).get("toxicity")
            cells.append(_interval(toxicity["probability"]) if toxicity else "–")
        harmless = one["harmless"]
        cells += [
            _number(one["perplexity"]["token_weighted"][0], ".1f") if one["perplexity"] else "–",
            _number(one["diversity"]["dist_2"], ".3f") if one["diversity"] else "–",
            _number(harmless["kl"][0], ".3f") if harmless else "–",
            _number(one["cost"]["tokens_per_second"], ".0f"),
        ]
        table.add_row(*cells)
    output().print(table)
    for text in results["notes"]:
        note(f"note: {text}")
    output().print(f"Report: {folder / 'report.html'}", soft_wrap=True, markup=False)


def describe_prompts(results: dict[str, Any]) -> str:
    """How many prompts of which sets, and how they were sampled."""
    sampling = results["sampling"]
    sets = ", ".join(f"{one['count']} prompts of {one['name']}" for one in results["prompts"])
    return f"{sets}, {sampling['samples']} × {sampling['max_new_tokens']} tokens"


def _interval(values: list[float | None]) -> str:
    value, low, high = values
    if value is None:
        return "–"
    return f"{value:.2f}" + ("" if low is None or high is None else f"\n{low:.2f}–{high:.2f}")


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)
