"""Public names of a package that are imported when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562), for torch takes seconds to import.

    Set them only where not ``TYPE_CHECKING``: a type checker is to see real imports of the same
    names instead, and to report other names.

    Args:
        package: The package's ``__name__``.
        modules: The module of each public name, relative to the package.

    Returns:
        Both functions; the first raises ``AttributeError`` for a name without an entry.
    """

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names
