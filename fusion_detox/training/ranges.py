"""Settings with a range and a help text: fields of frozen dataclasses, checked when made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fusion_detox.errors import ConfigError


def setting(
    default: Any, group: str, text: str, low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field; the command line's options and help are made from its metadata."""
    return dataclasses.field(
        default=default, metadata={"group": group, "help": text, "low": low, "high": high}
    )


def check_settings(settings: Any) -> None:
    """Checks each field of a dataclass against its range and its literal type.

    Raises:
        ConfigError: A value is not one of the words that its type lists, is no finite number or is
            outside its range. ``None`` passes.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            known = ", ".join(map(str, get_args(hint)))
            raise ConfigError(f"{field.name} must be one of {known}, not {value!r}")
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if value is None or low is None:
            continue
        top = math.inf if high is None else high
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= top:
            most = "" if high is None else f" and at most {high:g}"
            raise ConfigError(
                f"{field.name} must be a number of at least {low:g}{most}, but is {value!r}"
            )
