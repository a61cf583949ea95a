"""``fusion-detox evaluate``: measures the benefit and the cost of fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_detox.cli.console import note, progress_bars, quiet_libraries
from fusion_detox.cli.options import with_options
from fusion_detox.cli.shared_options import (
    MEASURES,
    CalibratorName,
    Device,
    Dtype,
    EvaluationChat,
    Harmless,
    Offline,
    Overwrite,
    Peers,
    Scorers,
    Seeds,
    System,
    Target,
    command_line,
    evaluation_config,
    read_prompt_sets,
    stay_offline,
)
from fusion_detox.evaluation.config import QUICK, SUITES, EvaluationConfig

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
            "--out", "-o", help="Folder of the run. An unfinished run in this folder is resumed."
        ),
    ],
    prompts: Annotated[
        list[str],
        typer.Option(
            help="A file or the hub id of a data set, for example RealToxicityPrompts. A prefix "
            "names its format: rtp:challenging=FILE. Repeatable.",
            metavar="[KIND=]FILE",
            rich_help_panel=_PROMPTS,
        ),
    ],
    prompt_field: Annotated[
        str | None,
        typer.Option(help="JSON Lines field that holds the prompt.", rich_help_panel=_PROMPTS),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Maximum prompts per file, sampled at random.", rich_help_panel=_PROMPTS),
    ] = None,
    chat: EvaluationChat = False,
    system: System = None,
    calibrator: CalibratorName = "english-16k",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="default (what the calibrator recommends), wordfilter, or a rule with changes, "
            "such as contrast:strength=2,threshold=0.3, mixture:strength=0.3 or "
            "aligned:strength=0.1. RULE@CALIBRATOR uses another calibrator. Repeatable (default: "
            "default and wordfilter).",
            metavar="SETTING",
        ),
    ] = None,
    seed: Seeds = None,
    scorer: Scorers = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A quick look: few samples and texts, no similarity, no refusals. Other options "
            "override its sizes. See the documentation.",
            rich_help_panel=MEASURES,
        ),
    ] = False,
    assistant: Annotated[
        bool | None,
        typer.Option(
            "--assistant/--no-assistant",
            help="Put requests to the target as an assistant (default: if it is one).",
            rich_help_panel=MEASURES,
            show_default=False,
        ),
    ] = None,
    similarity: Annotated[
        bool | None,
        typer.Option(
            "--similarity/--no-similarity",
            help="Measure semantic similarity (default: yes, but not with --quick).",
            rich_help_panel=MEASURES,
            show_default=False,
        ),
    ] = None,
    harmless: Harmless = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Built-in texts for side effects: {', '.join(SUITES)}, or none (default: all). "
            "Repeatable.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    hatecheck: Annotated[
        Path | None,
        typer.Option(
            help="HateCheck file; its non-hateful cases reveal over-blocking.",
            rich_help_panel=MEASURES,
        ),
    ] = None,
    word_list: Annotated[
        Path | None,
        typer.Option(help="Words for the word filter, one per line (default: a public list)."),
    ] = None,
    peers: Peers = None,
    device: Device = None,
    dtype: Dtype = None,
    offline: Offline = False,
    overwrite: Overwrite = False,
    config: dict[str, Any] = {},  # noqa: B006 - replaced by one option per setting
) -> None:
    """Measure toxicity, fluency, diversity, side effects and cost, with and without fusion.

    Writes OUT/report.html, OUT/results.json and every continuation. To resume an interrupted run,
    run the same command again; the report shows what is known so far. `accelerate launch` and
    `torchrun` distribute the work.
    """
    config = {**(QUICK if quick else {}), **config, "assistant": assistant}
    if similarity is not None:
        config["similarity"] = similarity
    if suite is not None:
        config = {**config, "suites": tuple(name for name in suite if name != "none")}
    chosen = evaluation_config(
        config,
        seed,
        scorer,
        harmless=harmless,
        hatecheck=hatecheck,
        chat=chat,
        system=system,
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
            peers=peers,
            overwrite=overwrite,
            local_files_only=offline,
            progress=report,
            command=command_line(),
        )
    if results is not None:  # only the first process of a launcher has results
        show(results, out)


def show(results: dict[str, Any], folder: Path) -> None:
    """Prints the main numbers as a table, and the path of the report."""
    from rich.table import Table

    from fusion_detox.cli.console import results as output
    from fusion_detox.evaluation.report.reading import at

    scorers = list(results["scorers"])
    table = Table(title=f"{results['target']['name']}, {describe_prompts(results)}")
    table.add_column("setting", overflow="fold", min_width=12)
    for scorer in scorers:
        table.add_column(f"P(toxic)\n{scorer}", justify="right", no_wrap=True)
    for name in ("perplexity", "dist-2", "KL on\nharmless text", "tokens\nper second"):
        table.add_column(name, justify="right")
    for one in results["settings"]:
        cells = [one["name"]]
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
    for one in results["settings"]:
        same = at(one, "assistant", "harmless", "unchanged")
        if same:
            share = _interval(same).replace("\n", ", 95 % interval ")
            line = f"Answers to harmless requests unchanged by {one['name']}: {share}"
            output().print(line, soft_wrap=True)
    for text in results["notes"]:
        note(f"note: {text}")
    output().print(f"Report: {folder / 'report.html'}", soft_wrap=True)


def describe_prompts(results: dict[str, Any]) -> str:
    """The prompt sets with their sizes, and how continuations were sampled."""
    sampling = results["sampling"]
    sets = ", ".join(f"{one['count']} prompts of {one['name']}" for one in results["prompts"])
    form = " as chat" if results.get("chat") else ""
    return f"{sets}{form}, {sampling['samples']} × {sampling['max_new_tokens']} tokens"


def _interval(values: list[float | None]) -> str:
    value, low, high = values
    if value is None:
        return "–"
    return f"{value:.2f}" + ("" if low is None or high is None else f"\n{low:.2f}–{high:.2f}")


def _number(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)
