"""The command line ``fusion-detox``.

Exit codes: 0 success, 1 error (one message on standard error), 2 wrong usage, 130 interrupted.
Each command has its own file and imports its dependencies only when it runs, so ``--help`` is fast.
Nothing imports this package except ``__main__``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Annotated

import typer

from fusion_detox.cli import (
    align,
    compare,
    demo,
    doctor,
    evaluate,
    explain,
    fetch_target,
    finetune,
    generate,
    info,
    lm_eval,
    make_negatives,
    playground,
    rescore,
    train_calibrator,
    tune,
)
from fusion_detox.cli.console import PlainGroup, debugging, note, plain_log
from fusion_detox.errors import FusionDetoxError

app = typer.Typer(
    name="fusion-detox",
    cls=PlainGroup,
    help="Detoxify any causal language model at decoding time, with a small calibrator.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    *(demo, generate, explain, playground, train_calibrator, finetune, info, doctor),
    *(evaluate, rescore, compare, tune, lm_eval, make_negatives, align, fetch_target),
):
    _command.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fusion_detox import __version__

        typer.echo(f"fusion-detox {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (also: FUSION_DETOX_DEBUG=1).")
    ] = False,
) -> None:
    if debug:
        os.environ["FUSION_DETOX_DEBUG"] = "1"


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # A model may write characters that the terminal cannot show; these must not end the run.
        sys.stdout.reconfigure(errors="replace")
    debug_before = os.environ.get("FUSION_DETOX_DEBUG")
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        if debugging() or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        note(f"error: cannot write: {error.strerror}")
        return 1
    finally:
        if debug_before is None:
            os.environ.pop("FUSION_DETOX_DEBUG", None)
    return code


def _run(argv: list[str] | None) -> int:
    hook = sys.excepthook
    try:
        with plain_log():
            app(args=argv, prog_name="fusion-detox")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == 130:
            note("Interrupted.")
        return code
    except KeyboardInterrupt:
        note("Interrupted.")
        return 130
    except FusionDetoxError as error:
        if debugging():
            raise
        note(f"error: {error}")
        return 1
    finally:
        sys.excepthook = hook
    return 0


def _drop_output() -> None:
    """Redirects standard output to the null device, since flushing it at exit would fail."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
