"""Find the differences between two JSON values, for messages about changed settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each place where two values differ, such as ``a.b[0]``, and both values there.

    A missing key counts as ``None``. Lists of different lengths are one difference.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                inner = f"{name}.{key}" if name else str(key)
                yield from differences(before.get(key), now.get(key), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            if one != other:
                yield from differences(one, other, f"{name}[{number}]")
    else:
        yield name, before, now
