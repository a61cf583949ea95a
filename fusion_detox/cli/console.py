"""Console output: results go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def results() -> Console:
    """The console for a command's results."""
    from rich.console import Console

    return Console(highlight=False)


def messages() -> Console:
    """The console for notes, progress and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Prints one line for the user, without interpreting markup."""
    messages().print(text, markup=False, soft_wrap=True)


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
        TextColumn("{task.description}"),
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
    sys.stderr.write(f"warning: {message}\n")
