"""Where output goes: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def results() -> Console:
    """A console for what a command was asked for."""
    from rich.console import Console

    return Console(highlight=False)


def messages() -> Console:
    """A console for notes, progress and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """One line for the user, as it is, without markup."""
    messages().print(text, markup=False, soft_wrap=True)


def debugging() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get("FUSION_DETOX_DEBUG", "") not in ("", "0")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps loading bars and log lines of other libraries off the terminal; ours stay."""
    if debugging():
        yield
        return
    from fusion_detox.files.models import quiet_transformers

    with quiet_transformers(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"warning: {message}\n")
