"""``fusion-detox make-negatives``: toxic and neutral paraphrases by a language model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_detox.cli.console import messages, note, progress_bars, quiet_libraries, write_line
from fusion_detox.cli.options import with_options
from fusion_detox.errors import ConfigError
from fusion_detox.training.negatives.config import NegativesConfig

if TYPE_CHECKING:
    from fusion_detox.training.negatives.report import Estimate, NegativesReport
    from fusion_detox.training.negatives.requests import Writer

_MODEL, _JUDGES, _COST = "Model", "Filters", "Cost"
_SHOWN_FAILURES = 5
_EPILOG = """
**Examples**

    fusion-detox make-negatives --model my-llm --in sentences.txt --out pairs.jsonl

    fusion-detox make-negatives --endpoint http://localhost:8000/v1 --model served-name
    --in posts.jsonl --field text --out pairs.jsonl --parallel 16

    fusion-detox make-negatives --out pairs.jsonl --refilter --toxic-from 0.8
"""


def _option(text: str, panel: str | None = None, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    options = with_options(NegativesConfig, into="settings")
    app.command("make-negatives", epilog=_EPILOG)(options(make_negatives))


def make_negatives(
    out: Annotated[
        Path, _option("File of pairs to write; OUT.work stores the answers.", None, "--out", "-o")
    ],
    settings: dict[str, Any],
    source: Annotated[
        str | None,
        _option(
            "Sentences: .txt with one per line, or .jsonl, .json, .csv, .tsv (each also .gz), or "
            "a hub id org/name[:split].",
            None,
            "--in",
            metavar="FILE",
        ),
    ] = None,
    field: Annotated[str, _option("Field that holds the sentence.")] = "text",
    limit: Annotated[int | None, _option("Use only the first N sentences.", metavar="N")] = None,
    model: Annotated[
        str | None,
        _option("A causal language model: a folder, a hub id, or its name at --endpoint.", _MODEL),
    ] = None,
    endpoint: Annotated[
        str | None,
        _option(
            "Address of an OpenAI-compatible service, such as http://localhost:8000/v1.",
            _MODEL,
            metavar="URL",
        ),
    ] = None,
    key_variable: Annotated[
        str | None,
        _option(
            "Environment variable that contains the endpoint's key (default: no key is sent).",
            _MODEL,
            metavar="NAME",
        ),
    ] = None,
    parallel: Annotated[int, _option("Number of concurrent requests to an endpoint.", _MODEL)] = 4,
    timeout: Annotated[float, _option("Seconds to wait for an endpoint's answer.", _MODEL)] = 120.0,
    retries: Annotated[int, _option("Maximum number of retries of a request.", _MODEL)] = 5,
    prompts: Annotated[
        Path | None,
        _option("JSON file with custom prompts: positive, negative, system, frame.", _MODEL),
    ] = None,
    revision: Annotated[
        str | None, _option("Branch, tag or commit of a hub model.", _MODEL)
    ] = None,
    batch_size: Annotated[int, _option("Requests per batch for a local model.", _MODEL)] = 8,
    device: Annotated[
        str | None, _option("Such as cpu or cuda:1 (default: cuda if available).", _MODEL)
    ] = None,
    dtype: Annotated[str | None, _option("Such as bfloat16.", _MODEL)] = None,
    scorer: Annotated[
        str,
        _option("Toxicity scorer: lexical, contextual, detoxify:… or classifier:MODEL.", _JUDGES),
    ] = "contextual",
    similarity_model: Annotated[
        str | None,
        _option("A sentence-transformers model (default: all-MiniLM-L6-v2).", _JUDGES),
    ] = None,
    closeness_model: Annotated[
        str | None,
        _option("Causal language model for the likelihood filter (default: no filter).", _JUDGES),
    ] = None,
    refilter: Annotated[
        bool,
        _option("Send no requests, but filter the answers in OUT.work again.", None, "--refilter"),
    ] = False,
    price_in: Annotated[float | None, _option("Price per million prompt tokens.", _COST)] = None,
    price_out: Annotated[float | None, _option("Price per million answer tokens.", _COST)] = None,
    dry_run: Annotated[bool, _option("Show the cost and stop.", _COST, "--dry-run")] = False,
    yes: Annotated[bool, _option("Start without confirmation.", _COST, "--yes", "-y")] = False,
    confirm_above: Annotated[
        int, _option("Ask for confirmation above this number of requests.", _COST)
    ] = 1000,
    as_json: Annotated[
        bool, _option("Write the report to standard output as JSON.", None, "--json")
    ] = False,
    overwrite: Annotated[
        bool, _option("Delete the answers of earlier runs.", None, "--overwrite")
    ] = False,
    offline: Annotated[bool, _option("Use downloaded files only.", None, "--offline")] = False,
) -> None:
    """Ask a language model for toxic and neutral paraphrases; keep those that pass the filters.

    After an interruption, run the same command again to resume. The files contain abusive text.
    """
    if refilter and (endpoint or dry_run):
        raise ConfigError("--refilter sends no requests; remove --endpoint and --dry-run")
    if not refilter and (source is None or model is None):
        raise ConfigError("--in and --model are required, except with --refilter")
    sentences = None if source is None else _sentences(source, field, limit)

    from fusion_detox.training.negatives.config import PromptTexts
    from fusion_detox.training.negatives.judges import Judges
    from fusion_detox.training.negatives.pipeline import make_negatives as make
    from fusion_detox.training.negatives.report import Prices

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

    confirmed = False

    def confirm(planned: Estimate) -> bool:
        nonlocal confirmed
        _show_estimate(planned)
        asks = planned.requests > confirm_above and not yes and sys.stdin.isatty()
        confirmed = not dry_run and (not asks or typer.confirm("Continue?", err=True))
        return confirmed

    with quiet_libraries(), progress_bars() as progress:
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
        write_line(json.dumps(report.to_dict(), ensure_ascii=True))
    if not confirmed and not refilter:
        note("No requests were sent.")
        raise typer.Exit(0 if dry_run else 1)
    _show_report(report)
    if not as_json:
        write_line(str(out))
    if not report.pairs or not (refilter or report.complete):
        raise typer.Exit(1)


def _sentences(source: str, field: str, limit: int | None) -> list[str]:
    """One sentence per line of a text file, or one per row of any other source."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1, but is {limit}")
    from fusion_detox.training.data.corpus import Columns, read_documents

    texts = [document.text for document in read_documents([source], Columns(field))]
    if source.lower().removesuffix(".gz").endswith(".txt"):
        texts = [line for text in texts for line in text.splitlines() if line.strip()]
    return texts[:limit]


def _show_estimate(planned: Estimate) -> None:
    if not planned.requests:
        note("All answers are stored already; only the filters will run.")
        return
    text = (
        f"To send: {planned.requests:,} requests, about {planned.prompt_tokens:,} prompt tokens "
        f"and {planned.completion_tokens:,} answer tokens (at most "
        f"{planned.most_completion_tokens:,})"
    )
    if planned.price is not None:
        text += f", price about {planned.price:,.2f} (at most {planned.most_price:,.2f})"
    note(text + ".")


def _show_report(report: NegativesReport) -> None:
    from rich.table import Table

    rows = {
        "sentences": f"{report.sentences:,}",
        "requests answered": f"{report.answered:,} of {report.requests:,}",
        "tokens": f"{report.prompt_tokens:,} prompt, {report.completion_tokens:,} answer",
        "pairs": f"{report.pairs:,}",
        "positives, negatives in pairs": f"{report.positives:,}, {report.negatives:,}",
    }
    if report.price is not None:
        rows["price"] = f"{report.price:,.2f}"
    for side, counts in report.dropped.items():
        rows |= {f"{side}s dropped: {reason}": f"{n:,}" for reason, n in counts.items()}
    for reason, count in report.without_pair.items():
        rows[f"sentences without a pair: {reason}"] = f"{count:,}"
    table = Table(title=report.out, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    messages().print(table)
    if report.failed:
        note(
            f"{report.failed} requests for {report.failed_sentences} sentences failed "
            f"({report.answers} lists them):"
        )
        for reason, count in list(report.failures.items())[:_SHOWN_FAILURES]:
            note(f"  {count} × {reason}")
    if report.stopped:
        note(f"Stopped early: {report.stopped}")
    if missing := report.failed + report.unasked:
        note(
            f"{missing} of {report.requests} requests have no answer; run the same command again "
            "to send only these."
        )
    if not report.pairs:
        note("No pair passed the filters; try other thresholds with --refilter.")
