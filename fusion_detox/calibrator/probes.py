"""``Probe``: a short text on which a calibrator's effect is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fusion_detox.errors import CalibratorError


class Probe(NamedTuple):
    """A short text, continuations that fusion must hold back, and harmless ones.

    A processor checks itself on the probes of its calibrator when it is created.

    Attributes:
        context: The text, without a space at its end.
        avoided: Continuations that must lose probability, with the space before them, if any.
        kept: Continuations to compare them with. Choose words that are at least as likely here in
            harmless text.
    """

    context: str
    avoided: tuple[str, ...]
    kept: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The probe as JSON values."""
        return {"context": self.context, "avoided": [*self.avoided], "kept": [*self.kept]}


def read_probes(values: Iterable[Probe | Mapping[str, Any]]) -> tuple[Probe, ...]:
    """Probes from JSON objects with the fields of :class:`Probe`.

    Raises:
        CalibratorError: A probe is incomplete or empty, or has other fields.
    """
    found = []
    for number, value in enumerate(values):
        fields: Any = value._asdict() if isinstance(value, Probe) else value
        named = isinstance(fields, Mapping) and fields.keys() == set(Probe._fields)
        words: list[Any] = [fields["avoided"], fields["kept"]] if named else []
        if not (
            named
            and isinstance(fields["context"], str)
            and fields["context"].strip()
            and all(isinstance(some, (list, tuple)) and some for some in words)
            and all(isinstance(word, str) and word.strip() for some in words for word in some)
        ):
            raise CalibratorError(
                f"probe {number} is {value!r}, but a probe has a text 'context' and the non-empty "
                "lists of words 'avoided' and 'kept'. Correct it, or remove it"
            )
        found.append(Probe(fields["context"], tuple(fields["avoided"]), tuple(fields["kept"])))
    return tuple(found)
