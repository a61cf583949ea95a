"""Text of others that may be printed: no terminal escapes, and no hidden order of characters."""

from __future__ import annotations

import json
from typing import Any

# C0 except tab and line feed, DEL, and C1, which some terminals read as escapes.
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {0x09, 0x0A}
# Marks, embeddings, overrides and isolates that change the order in which text is shown.
_BIDI = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_REMOVED = dict.fromkeys(_CONTROLS | _BIDI)
# JSON allows the last two in strings, but readers such as str.splitlines end a line there.
_ESCAPED = {code: f"\\u{code:04x}" for code in (_CONTROLS | _BIDI | {0x2028, 0x2029}) if code > 31}


def printable(text: str) -> str:
    """The text without control characters, except tabs and line feeds, and bidirectional marks."""
    return text.translate(_REMOVED)


def printable_json(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON in which such characters are escaped, so that nothing is lost."""
    return escape_json(json.dumps(value, indent=indent, ensure_ascii=False))


def escape_json(text: str) -> str:
    """JSON text with such characters escaped."""
    return text.translate(_ESCAPED)
