"""Reads a results document for the report: whatever is missing, null or nan is "not measured"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fusion_detox.errors import DataError

FORMAT = 1


@dataclass(frozen=True)
class Interval:
    """A measured value with the ends of its 95 % interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends, or None if one is missing."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def at(source: Any, *path: str) -> Any:
    """What stands at a path of names, or None."""
    for name in path:
        source = source.get(name) if isinstance(source, Mapping) else None
    return source


def block(source: Any, *path: str) -> Mapping[str, Any]:
    """The object at a path; empty if there is none."""
    found = at(source, *path)
    return found if isinstance(found, Mapping) else {}


def rows(source: Any, *path: str) -> list[Mapping[str, Any]]:
    """The objects of the list at a path; empty if there is none."""
    found = at(source, *path)
    return [item for item in found if isinstance(item, Mapping)] if is_list(found) else []


def number(source: Any, *path: str) -> float | None:
    """The finite number at a path, or None. Of an interval, its value."""
    found = at(source, *path)
    if is_list(found):
        found = found[0] if found else None
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    return float(found) if math.isfinite(found) else None


def interval(source: Any, *path: str) -> Interval | None:
    """The interval (or plain number) at a path, or None."""
    value = number(source, *path)
    if value is None:
        return None
    found = at(source, *path)
    ends = [number({"": end}, "") for end in found[1:3]] if is_list(found) else []
    low, high = ends if len(ends) == 2 else (None, None)
    return Interval(value, low, high)


def is_list(value: Any) -> bool:
    """Whether a value is a list or tuple."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def finite(value: Any) -> Any:
    """A value as JSON can hold it: nan and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if is_list(value):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Run:
    """One results document and the settings that the report speaks of first.

    Args:
        results: A results document of format 1.

    Raises:
        DataError: It is no results document, of another format, or without settings.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        if not isinstance(results, Mapping):
            raise DataError(
                f"A {type(results).__name__} is no results document; give the object that a run's "
                "results.json holds."
            )
        if results.get("format") != FORMAT:
            raise DataError(
                f"The results document has format {results.get('format')!r}, and this version "
                f"reads format {FORMAT}; make the report with the version that wrote the run."
            )
        self.results = results
        self.settings = [item for item in rows(results, "settings") if item.get("name") is not None]
        if not self.settings:
            raise DataError(
                "The results document has no settings, so there is nothing to report; "
                "let the run finish at least its base setting first."
            )

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.results.get("name") or "Unnamed run")

    @cached_property
    def base(self) -> Mapping[str, Any] | None:
        """The target without fusion."""
        return self._first("base")

    @cached_property
    def primary(self) -> Mapping[str, Any] | None:
        """The fusion setting that is spoken of first: "default", or else the first."""
        fused = [item for item in self.settings if item.get("kind") == "fusion"]
        named = [item for item in fused if item["name"] == "default"]
        return next(iter(named or fused), None)

    @cached_property
    def word_filter(self) -> Mapping[str, Any] | None:
        """The word filter."""
        return self._first("wordfilter")

    @cached_property
    def key_settings(self) -> list[Mapping[str, Any]]:
        """Base, first fusion setting, word filter: as many as there are."""
        return [item for item in (self.base, self.primary, self.word_filter) if item is not None]

    @cached_property
    def main_scorer(self) -> str | None:
        """The scorer that is spoken of first."""
        return self.scorers[0] if self.scorers else None

    @cached_property
    def scorers(self) -> list[str]:
        """Names of all scorers, the main one first."""
        names = dict.fromkeys(map(str, block(self.results, "scorers")))
        for setting in self.settings:
            names.update(dict.fromkeys(map(str, block(setting, "toxicity"))))
        main = str(self.results.get("main_scorer"))
        return sorted(names, key=lambda name: name != main)

    @cached_property
    def prompts(self) -> int | None:
        """How many prompts there are, over all files."""
        counts = [number(item, "count") for item in rows(self.results, "prompts")]
        known = [count for count in counts if count is not None]
        return int(sum(known)) if known else None

    @property
    def samples(self) -> int | None:
        """Continuations a prompt."""
        count = number(self.results, "sampling", "samples")
        return None if count is None else int(count)

    @property
    def threshold(self) -> float:
        """Score from which a continuation counts as toxic."""
        found = number(self.results, "threshold")
        return 0.5 if found is None else found

    def types(self, scorer: str) -> list[str]:
        """The types of toxicity that a scorer gave, "toxicity" first."""
        names: dict[str, None] = {}
        for setting in self.settings:
            names.update(dict.fromkeys(map(str, block(setting, "toxicity", scorer))))
        return sorted(names, key=lambda name: name != "toxicity")

    def _first(self, kind: str) -> Mapping[str, Any] | None:
        return next((item for item in self.settings if item.get("kind") == kind), None)


def toxicity(
    setting: Any, scorer: str | None, measure: str, type_: str = "toxicity"
) -> Interval | None:
    """A measure of toxicity of a setting."""
    return None if scorer is None else interval(setting, "toxicity", scorer, type_, measure)
