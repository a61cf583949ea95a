"""Command-line options generated from a settings dataclass, so the two cannot drift apart."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_type_hints

import typer


def with_options(
    settings: type[Any], into: str, *, panel: str | None = None, show_defaults: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces a command's parameter ``into`` with one option per field of ``settings``.

    The command receives a dictionary of the options that the user gave. Help text comes from a
    field's metadata (``help``, ``group``) or else from ``Attributes`` in the docstring. A field
    that may be ``None`` also accepts the word ``none``. A field with ``option=False`` in its
    metadata is skipped.

    Args:
        settings: A dataclass whose fields are numbers, strings, literals or ``None``.
        into: Name of the command's parameter.
        panel: Heading for options without a ``group``.
        show_defaults: Whether to show the fields' defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints, texts = get_type_hints(settings), _attribute_texts(settings)
        fields = [f for f in dataclasses.fields(settings) if f.metadata.get("option", True)]
        signature = inspect.signature(command, eval_str=True)
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
            if parameter.name != into
        ]
        for field in fields:
            text = field.metadata.get("help", texts.get(field.name, ""))
            if show_defaults and field.default is not None:
                text += f" (default: {field.default})"
            group = field.metadata.get("group", panel)
            flags = (_flag(field.name), *field.metadata.get("aliases", ()))
            annotation = _annotation(flags, hints[field.name], text.strip(), group)
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
                )
            )

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            given = {field.name: values.pop(field.name) for field in fields}
            chosen = {
                name: _parse(name, hints[name], value) if _may_be_none(hints[name]) else value
                for name, value in given.items()
                if value is not None
            }
            command(**values, **{into: chosen})

        wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters
        )
        wrapper.__annotations__ = {one.name: one.annotation for one in parameters}
        return wrapper

    return decorate


def _annotation(flags: Sequence[str], hint: Any, text: str, group: str | None) -> Any:
    metavar = f"<{_inner(hint).__name__}|none>" if _may_be_none(hint) else None
    option = typer.Option(
        *flags, help=text, rich_help_panel=group, metavar=metavar, show_default=False
    )
    return Annotated[str | None if metavar else hint | None, option]


def _parse(name: str, hint: Any, value: str) -> Any:
    if value.lower() == "none":
        return None
    kind = _inner(hint)
    try:
        return kind(value)
    except ValueError as error:
        problem = f"{value!r} is neither a valid {kind.__name__} nor 'none'."
        raise typer.BadParameter(problem, param_hint=_flag(name)) from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _may_be_none(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _inner(hint: Any) -> Any:
    return next(part for part in get_args(hint) if part is not type(None))


def _attribute_texts(settings: type[Any]) -> dict[str, str]:
    """The docstring's description of each field (empty under ``python -OO``)."""
    _, _, attributes = inspect.cleandoc(settings.__doc__ or "").partition("Attributes:")
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", attributes, flags=re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}
