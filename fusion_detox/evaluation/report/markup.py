"""HTML that cannot be broken by the data in it: what is not ``Html`` is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# Not allowed in HTML, or impossible to write as UTF-8: controls, halves of surrogate pairs.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = {"br", "col", "hr", "meta"}


class Html(str):
    """Text that is HTML already, and safe."""

    __slots__ = ()


def plain(value: object) -> str:
    """The text of a value; characters that no document may hold become U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", str(value))


def line(value: object, longest: int = 0) -> str:
    """The text of a value on one line, cut to ``longest`` characters (0: not cut)."""
    text = " ".join(plain(value).split())
    return text if not longest or len(text) <= longest else text[: longest - 1].rstrip() + "…"


def escape(value: object) -> Html:
    """A value as HTML text; ``Html`` stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(plain(value)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts after each other, each escaped where it is not ``Html``; ``None`` is left out."""
    return Html(escape(between).join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        name: Its name, which must not come from data.
        children: Its content; what is not ``Html`` is escaped, ``None`` is left out.
        attributes: ``class_`` is written ``class``, ``aria_label`` ``aria-label``. ``True`` gives
            an attribute without value; ``None`` and ``False`` leave it out.
    """
    written = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        written.append(label if value is True else f'{label}="{html.escape(plain(value))}"')
    opening = f"<{' '.join(written)}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")
