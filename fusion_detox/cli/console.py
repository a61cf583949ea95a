"""Console output: results go to standard output, everything else to standard error.

Names, cards, prompts and completions are written by others. All that a command prints passes
:func:`printable` here, so that none of them can send an escape sequence to the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from fusion_detox.files.printable import printable, printable_json

if TYPE_CHECKING:
    from rich.console import Console


def results() -> Console:
    """The console for a command's results; strings are printed as they are, without markup."""
    return _console(stderr=False)


def messages() -> Console:
    """The console for notes, progress and errors; strings are printed without markup."""
    return _console(stderr=True)


def note(text: str) -> None:
    """Prints one line for the user."""
    messages().print(text, soft_wrap=True)


def write_line(text: str) -> None:
    """Writes a line to standard output, for programs to read."""
    typer.echo(printable(text))


def write_json(value: Any) -> None:
    """Writes a JSON value to standard output."""
    typer.echo(printable_json(value, indent=2))


def _console(*, stderr: bool) -> Console:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PlainConsole(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                # Rich's own codes are control segments and styles.
                yield Segment(text if control else printable(text), style, control)

    return PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def plain_log() -> Iterator[None]:
    """Prints what the library logs without escape sequences."""
    handler = logging.lastResort
    assert handler is not None
    before, handler.formatter = handler.formatter, _PlainFormatter()
    try:
        yield
    finally:
        handler.formatter = before


class PlainGroup(TyperGroup):
    """The commands. Messages about wrong usage repeat arguments, but no escapes."""

    def make_context(self, *values: Any, **named: Any) -> Any:
        """As typer does it."""
        with _plain_usage_errors():
            return super().make_context(*values, **named)

    def invoke(self, ctx: Any) -> Any:
        """As typer does it."""
        with _plain_usage_errors():
            return super().invoke(ctx)


@contextlib.contextmanager
def _plain_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Recent versions of typer bring a click of their own.
        if hasattr(error, "format_message") and isinstance(getattr(error, "message", None), str):
            error.message = printable(error.message)  # type: ignore[attr-defined]
        raise


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def debugging() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get("FUSION_DETOX_DEBUG", "") not in ("", "0")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides the progress bars and log lines of other libraries, not our own."""
    if debugging():
        yield
        return
    from fusion_detox.files.models import quiet_transformers

    with quiet_transformers(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a progress bar per kind of work, or plain lines if stderr is not a terminal.

    Of an evaluation, it also shows how much of the whole run is done, and estimates the time left.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from fusion_detox.evaluation.plan import WHOLE

    console = messages()
    bars: dict[str, Any] = {}
    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=False,
        speed_estimate_period=3600,  # steps may be minutes long
    )

    def report(what: str, done: int, total: int) -> None:
        if what not in bars:
            shown.start()  # not earlier: a command may ask for confirmation first
            bars[what] = shown.add_task(what, total=total, amount="")
            if not console.is_terminal and what != WHOLE:
                note(what + _time_left(shown, bars.get(WHOLE)))
        amount = f"{done}/{total}" if what != WHOLE else f"{done / max(total, 1):.0%}"
        shown.update(bars[what], completed=done, total=total, amount=amount)

    try:
        yield report
    except KeyboardInterrupt:
        note("Finished work is kept. Run the same command again to resume.")
        raise
    finally:
        shown.stop()


def _time_left(shown: Any, bar: Any) -> str:
    left = None if bar is None else next(t for t in shown.tasks if t.id == bar).time_remaining
    return "" if left is None else f" (about {max(1, round(left / 60))} min left)"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(printable(f"warning: {message}\n"))
