"""Results documents as the report reads them: missing, null or nan means "not measured"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fusion_detox.errors import DataError

FORMAT = 1
# HTML, XML or UTF-8 cannot represent these: control characters, lone surrogates, noncharacters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Interval:
    """A measured value and the ends of its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends, or None if one is missing."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def printable(text: str) -> str:
    """Replace the characters that a page cannot represent with U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", text)


def line(value: object, longest: int = 0) -> str:
    """The text of a value on one line, cut to ``longest`` characters (0: not cut)."""
    text = " ".join(printable(str(value)).split())
    return text if not longest or len(text) <= longest else text[: longest - 1].rstrip() + "…"


def at(source: Any, *path: str) -> Any:
    """The value at a path of keys, or None."""
    for name in path:
        source = source.get(name) if isinstance(source, Mapping) else None
    return source


def block(source: Any, *path: str) -> Mapping[str, Any]:
    """The object at a path; empty if it is missing or not an object."""
    found = at(source, *path)
    return found if isinstance(found, Mapping) else {}


def rows(source: Any, *path: str) -> list[Mapping[str, Any]]:
    """The objects in the list at a path; empty if it is missing or not a list."""
    found = at(source, *path)
    return [item for item in found if isinstance(item, Mapping)] if is_list(found) else []


def prompt_form(source: Any) -> str:
    """How the prompts of a run were put to its target."""
    if at(source, "chat") is None:
        return "continued as plain text"
    system = at(source, "chat", "system")
    shown = "the template's" if system is None else f"“{line(system, 200)}”"
    return f"put as requests in the chat template, with {shown} system prompt"


def number(source: Any, *path: str) -> float | None:
    """The finite number at a path, or None. For an interval, its value."""
    found = at(source, *path)
    if is_list(found):
        found = found[0] if found else None
    return _finite(found)


def interval(source: Any, *path: str) -> Interval | None:
    """The interval (or plain number) at a path, or None."""
    found, value = at(source, *path), number(source, *path)
    if value is None:
        return None
    ends = map(_finite, found[1:3]) if is_list(found) and len(found) == 3 else ()
    return Interval(value, *ends)


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def is_list(value: Any) -> bool:
    """Whether a value is a list or tuple."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def jsonable(value: Any) -> Any:
    """The value as strict JSON can hold it: nan and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if is_list(value):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Run:
    """One results document, and the variants that the report shows first.

    Args:
        results: A results document of format 1. It lists the variants under ``settings``.

    Raises:
        DataError: It is not a results document, has another format, or has no settings.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        if not isinstance(results, Mapping):
            raise DataError(
                f"A {type(results).__name__} is not a results document; pass the object that a "
                "run's results.json holds."
            )
        if results.get("format") != FORMAT:
            raise DataError(
                f"The results document has format {results.get('format')!r}, but this version "
                f"reads format {FORMAT}; write the report with the version that wrote the run."
            )
        self.results = results
        self.variants = [item for item in rows(results, "settings") if item.get("name") is not None]
        if not self.variants:
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
        """The fusion variant that the summary describes: "default", or else the first."""
        fused = [item for item in self.variants if item.get("kind") == "fusion"]
        named = [item for item in fused if item["name"] == "default"]
        return next(iter(named or fused), None)

    @cached_property
    def word_filter(self) -> Mapping[str, Any] | None:
        """The target with a word filter."""
        return self._first("wordfilter")

    @cached_property
    def key_variants(self) -> list[Mapping[str, Any]]:
        """The base, the primary variant and the word filter, if they were measured."""
        return [item for item in (self.base, self.primary, self.word_filter) if item is not None]

    @cached_property
    def scorers(self) -> list[str]:
        """Names of all scorers, the main scorer first."""
        names = dict.fromkeys(map(str, block(self.results, "scorers")))
        for variant in self.variants:
            names.update(dict.fromkeys(map(str, block(variant, "toxicity"))))
        main = str(self.results.get("main_scorer"))
        return sorted(names, key=lambda name: name != main)

    @cached_property
    def calibrators(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """The distinct calibrators, each with its vocabulary map."""
        pairs = [(block(item, "calibrator"), block(item, "map")) for item in self.variants]
        return [pair for i, pair in enumerate(pairs) if pair[0] and pair not in pairs[:i]]

    @property
    def prompts(self) -> int | None:
        """The number of prompts in all prompt sets."""
        counts = [number(item, "count") for item in rows(self.results, "prompts")]
        known = [count for count in counts if count is not None]
        return int(sum(known)) if known else None

    @property
    def threshold(self) -> float:
        """The score from which a continuation counts as toxic."""
        found = number(self.results, "threshold")
        return 0.5 if found is None else found

    def types(self, scorer: str) -> list[str]:
        """The types of toxicity that a scorer reported, "toxicity" first."""
        names: dict[str, None] = {}
        for variant in self.variants:
            names.update(dict.fromkeys(map(str, block(variant, "toxicity", scorer))))
        return sorted(names, key=lambda name: name != "toxicity")

    def _first(self, kind: str) -> Mapping[str, Any] | None:
        return next((item for item in self.variants if item.get("kind") == kind), None)


def toxicity(
    variant: Any, scorer: str, measure: str = "probability", type_: str = "toxicity"
) -> Interval | None:
    """A measure of a variant's toxicity; by default the share of toxic prompts."""
    return interval(variant, "toxicity", scorer, type_, measure)


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The names of runs, numbered if several runs share one."""
    found: list[str] = []
    for run in runs:
        name, count = line(run.name, 60), 1
        label = name
        while label in found:
            count += 1
            label = f"{name} ({count})"
        found.append(label)
    return found
