"""Where two JSON values differ, for messages about settings that changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each place where two values differ, as ``a.b[0]``, with what both hold there.

    A key that only one of two objects has holds ``None`` in the other; lists of different length
    are one difference.
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
