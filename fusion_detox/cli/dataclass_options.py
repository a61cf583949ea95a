"""Command line options made from the fields of a settings dataclass, so that both never drift."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import typer


def with_options(settings: type[Any], into: str) -> Callable[[Callable[..., Any]], Any]:
    """Replaces the parameter ``into`` of a command by one option a field of ``settings``.

    The command receives a dictionary of the options that were given, under the name ``into``.
    Each field's metadata may hold ``help`` and ``group``.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(settings)
        names = [field.name for field in dataclasses.fields(settings)]
        options = []
        for field in dataclasses.fields(settings):
            shown = "" if field.default is None else f" [default: {field.default}]"
            option = typer.Option(
                f"--{field.name.replace('_', '-')}",
                help=field.metadata.get("help", "") + shown,
                rich_help_panel=field.metadata.get("group"),
                show_default=False,
            )
            options.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=typing.Annotated[_plain(hints[field.name]) | None, option],
                )
            )

        def run(**given: Any) -> Any:
            chosen = {name: given.pop(name) for name in names}
            return command(**given, **{into: {k: v for k, v in chosen.items() if v is not None}})

        signature = inspect.signature(command, eval_str=True)
        kept = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in signature.parameters.values()
            if p.name != into
        ]
        run.__signature__ = signature.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*kept, *options]}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _plain(hint: Any) -> Any:
    """The type that the command line reads: ``str`` for literals, ``X`` for ``X | None``."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(hint) if part is not type(None)))
    return hint
