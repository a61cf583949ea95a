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
    """Shows a progress bar per kind of work, or plain lines if stderr is not a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = messages()
    bars: dict[str, Any] = {}
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=False,
    )

    def report(what: str, done: int, total: int) -> None:
        if what not in bars:
            shown.start()  # not earlier: a command may ask for confirmation first
            bars[what] = shown.add_task(what, total=total)
            if not console.is_terminal:
                note(what)
        shown.update(bars[what], completed=done, total=total)

    try:
        yield report
    except KeyboardInterrupt:
        note("Finished work is kept. Run the same command again to resume.")
        raise
    finally:
        shown.stop()


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"warning: {message}\n")
