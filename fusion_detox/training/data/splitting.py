"""What is learned from, and what is only measured: by content, so that nothing is on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Keyed(Protocol):
    """What has a hash of its content."""

    @property
    def key(self) -> str:
        """At least six hex digits."""


Item = TypeVar("Item", bound=Keyed)


def split(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Items to learn from and about ``share`` of them held out; none where that would be all."""
    border = round(share * 16**6)
    held = [item for item in items if int(item.key[:6], 16) < border]
    rest = [item for item in items if int(item.key[:6], 16) >= border]
    return (rest, held) if rest else (list(items), [])
