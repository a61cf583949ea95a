"""What ``make-negatives`` shows on standard error: cost, progress, report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fusion_detox.cli.console import messages, note

if TYPE_CHECKING:
    from fusion_detox.training.negatives.cost import Estimate
    from fusion_detox.training.negatives.pipeline import Progress
    from fusion_detox.training.negatives.report import NegativesReport

_SHOWN = 5


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """Bars with rate and time left on standard error; lines of text where that is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    console = messages()
    tasks: dict[str, Any] = {}
    shown = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=False,
    )

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            if not tasks:  # not before the question whether to go on
                shown.start()
            tasks[what] = shown.add_task(what, total=total)
            if not console.is_terminal:
                note(f"{what} ({total})")
        shown.update(tasks[what], completed=done, total=total)

    try:
        yield report
    except KeyboardInterrupt:
        note("Every answer that came is kept; the same command goes on from there.")
        raise
    finally:
        shown.stop()


def show_estimate(planned: Estimate) -> None:
    """What is still to be asked, on standard error."""
    if not planned.requests:
        note("Every answer is there; only the filters are run.")
        return
    text = (
        f"To ask: {planned.requests:,} requests, about {planned.prompt_tokens:,} prompt and "
        f"{planned.completion_tokens:,} answered tokens (at most "
        f"{planned.most_completion_tokens:,})"
    )
    if planned.price is not None:
        text += f", about {planned.price:,.2f} (at most {planned.most_price:,.2f})"
    note(text + ".")


def show_report(report: NegativesReport) -> None:
    """What became of the sentences, and how to go on, on standard error."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(report.out), show_header=False)
    rows: list[tuple[str, str]] = [
        ("sentences", f"{report.sentences:,}"),
        ("requests answered", f"{report.answered:,} of {report.requests:,}"),
        ("tokens", f"{report.prompt_tokens:,} asked, {report.completion_tokens:,} answered"),
        ("pairs", f"{report.pairs:,}"),
        ("positives, negatives in them", f"{report.positives:,}, {report.negatives:,}"),
    ]
    if report.price is not None:
        rows.append(("price", f"{report.price:,.2f}"))
    for side, counts in report.dropped.items():
        rows += [(f"{side}s dropped: {reason}", f"{count:,}") for reason, count in counts.items()]
    for reason, count in report.without_pair.items():
        rows.append((f"sentences without a pair: {reason}", f"{count:,}"))
    for name, value in rows:
        table.add_row(escape(name), value)
    messages().print(table)
    if report.failed:
        note(
            f"{report.failed} requests of {report.failed_sentences} sentences failed "
            f"({report.answers} names them):"
        )
        for reason, count in list(report.failures.items())[:_SHOWN]:
            note(f"  {count} × {reason}")
    if report.stopped:
        note(f"Stopped early: {report.stopped}")
    if report.failed or report.unasked:
        note(
            f"{report.failed + report.unasked} of {report.requests} requests are without an "
            "answer; the same command asks for these only."
        )
    if not report.pairs:
        note("No pair passed the filters; --refilter takes other thresholds without asking again.")
