"""Train and held-out split by content hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Keyed(Protocol):
    """A document or paraphrase set, with a hash of its content."""

    @property
    def key(self) -> str:
        """The hash: at least six hex digits."""


Item = TypeVar("Item", bound=Keyed)


def split(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Split into training and held-out items; about a fraction ``share`` is held out.

    Equal items are never on both sides. If all items would be held out, none is.
    """
    border = round(share * 16**6)
    held = [item for item in items if int(item.key[:6], 16) < border]
    rest = [item for item in items if int(item.key[:6], 16) >= border]
    return (rest, held) if rest else (list(items), [])
