"""``fusion-detox make-negatives``: toxic and neutral paraphrases by a language model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_detox.cli.console import note, quiet_libraries
from fusion_detox.cli.negatives_output import bars, show_estimate, show_report
from fusion_detox.cli.options import with_options
from fusion_detox.errors import ConfigError
from fusion_detox.training.negatives.config import NegativesConfig

if TYPE_CHECKING:
    from fusion_detox.training.negatives.cost import Estimate
    from fusion_detox.training.negatives.requests import Writer

_MODEL, _JUDGES, _COST = "Model", "Filters", "Cost"
_EPILOG = """
**Examples**

    fusion-detox make-negatives --model my-llm --in sentences.txt --out pairs.jsonl

    fusion-detox make-negatives --endpoint http://localhost:8000/v1 --model served-name
    --in posts.jsonl --field text --out pairs.jsonl --parallel 16

    fusion-detox make-negatives --out pairs.jsonl --refilter --toxic-from 0.8
"""


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    options = with_options(NegativesConfig, into="settings")
    app.command("make-negatives", epilog=_EPILOG)(options(make_negatives))


def make_negatives(
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="File of pairs to write; answers are kept in OUT.work beside it."
        ),
    ],
    settings: dict[str, Any],
    source: Annotated[
        str | None,
        typer.Option(
            "--in",
            help="Sentences: .txt with one a line, or .jsonl, .json, .csv, .tsv (each also .gz), "
            "or a hub id org/name[:split].",
            metavar="FILE",
        ),
    ] = None,
    field: Annotated[str, typer.Option(help="Field of the sentence in rows.")] = "text",
    limit: Annotated[int | None, typer.Option(help="Take the first so many sentences.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A causal language model, folder or hub id; with --endpoint its name there.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Address of an OpenAI-compatible service, such as http://localhost:8000/v1.",
            metavar="URL",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    key_variable: Annotated[
        str | None,
        typer.Option(
            help="Environment variable with the endpoint's key; no key is sent without.",
            metavar="NAME",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    parallel: Annotated[
        int, typer.Option(help="Requests at a time to an endpoint.", rich_help_panel=_MODEL)
    ] = 4,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds to wait for an endpoint's answer.", rich_help_panel=_MODEL),
    ] = 120.0,
    retries: Annotated[
        int, typer.Option(help="How often to ask an endpoint again.", rich_help_panel=_MODEL)
    ] = 5,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with other prompts: positive, negative, system, frame.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=_MODEL),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Requests at a time to a local model.", rich_help_panel=_MODEL)
    ] = 8,
    device: Annotated[
        str | None,
        typer.Option(
            help="Such as cpu or cuda:1; cuda by default where there is one.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Such as bfloat16.", rich_help_panel=_MODEL)
    ] = None,
    scorer: Annotated[
        str,
        typer.Option(
            help="Toxicity: lexical, contextual, detoxify:unbiased, classifier:MODEL, …",
            rich_help_panel=_JUDGES,
        ),
    ] = "contextual",
    similarity_model: Annotated[
        str | None,
        typer.Option(
            help="A sentence-transformers model, all-MiniLM-L6-v2 by default.",
            rich_help_panel=_JUDGES,
        ),
    ] = None,
    closeness_model: Annotated[
        str | None,
        typer.Option(
            help="Causal model under which a paraphrase must be about as probable as its sentence.",
            rich_help_panel=_JUDGES,
        ),
    ] = None,
    refilter: Annotated[
        bool,
        typer.Option("--refilter", help="Ask nothing; filter the answers in OUT.work again."),
    ] = False,
    price_in: Annotated[
        float | None,
        typer.Option(help="Price of a million prompt tokens.", rich_help_panel=_COST),
    ] = None,
    price_out: Annotated[
        float | None,
        typer.Option(help="Price of a million answered tokens.", rich_help_panel=_COST),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the cost and stop.", rich_help_panel=_COST),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask.", rich_help_panel=_COST)
    ] = False,
    confirm_above: Annotated[
        int,
        typer.Option(help="Ask before more requests than this.", rich_help_panel=_COST),
    ] = 1000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write the report to standard output as JSON.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away the answers of before.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use downloaded files only.")] = False,
) -> None:
    """Ask a language model for toxic and neutral paraphrases; keep those that pass the filters.

    The same command goes on after any interruption. The files hold abusive text.
    """
    if refilter and (endpoint or dry_run):
        raise ConfigError("--refilter asks nothing; leave out --endpoint and --dry-run")
    if not refilter and (source is None or model is None):
        raise ConfigError("--in and --model are needed, except with --refilter")
    sentences = None if source is None else _sentences(source, field, limit)

    from fusion_detox.training.negatives.config import PromptTexts
    from fusion_detox.training.negatives.cost import Prices
    from fusion_detox.training.negatives.judges import Judges
    from fusion_detox.training.negatives.pipeline import make_negatives as make

    writer: Writer | None = None
    if endpoint is not None:
        from fusion_detox.training.negatives.endpoint import EndpointWriter

        writer = EndpointWriter(
            endpoint,
            model or "",
            key_variable=key_variable,
            parallel=parallel,
            retries=retries,
            timeout=timeout,
        )
    elif not refilter:
        from fusion_detox.training.negatives.local import LocalWriter

        writer = LocalWriter(
            model or "",
            revision=revision,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            local_files_only=offline,
        )

    agreed = False

    def confirm(planned: Estimate) -> bool:
        nonlocal agreed
        show_estimate(planned)
        long = planned.requests > confirm_above and not yes and sys.stdin.isatty()
        agreed = not dry_run and (not long or typer.confirm("Go on?", err=True))
        return agreed

    with quiet_libraries(), bars() as progress:
        report = make(
            sentences,
            out,
            writer=writer,
            config=NegativesConfig(**settings),
            prompts=None if prompts is None else PromptTexts.from_file(prompts),
            judges=Judges(scorer, similarity_model, closeness_model, device, offline),
            prices=Prices(price_in, price_out),
            confirm=confirm,
            refilter=refilter,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), ensure_ascii=True))
    if not agreed and not refilter:
        note("Nothing was asked.")
        raise typer.Exit(0 if dry_run else 1)
    show_report(report)
    if not as_json:
        typer.echo(str(out))
    if not report.pairs or not (refilter or report.complete):
        raise typer.Exit(1)


def _sentences(source: str, field: str, limit: int | None) -> list[str]:
    """One a line of a text file, else one a row."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, but is {limit}")
    from fusion_detox.training.data.corpus import Columns, read_documents

    texts = [document.text for document in read_documents([source], Columns(field))]
    if source.lower().removesuffix(".gz").endswith(".txt"):
        texts = [line for text in texts for line in text.splitlines() if line.strip()]
    return texts[:limit]
