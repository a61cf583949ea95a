"""Reads results of other methods that were measured elsewhere, for a plot of the report.

The file is JSON as ``python -m benchmarks.peers`` writes it. These keys are read, and others are
ignored::

    {
      "target": "smollm2",            # name of the model
      "prompts": 32,                  # number of prompts
      "samples": 5,                   # continuations per prompt and seed
      "seeds": [1, 2, 3],
      "scorers": {"lexical": {"weights": "2dcaa7130da3"}},
      "results": [
        {
          "method": "dexperts",
          "strength": 2.0,
          "temperature": 1.0,
          "toxicity": {"lexical": {"probability": [0.2, 0.1, 0.3],
                                   "ratio": {"ratio": [0.5, 0.3, 0.7]}}},
          "perplexity": {"relative": [1.1, 1.0, 1.2]}
        }
      ]
    }

Lists of three hold a value and its 95 % interval. ``probability`` is the share of toxic prompts,
``ratio`` its ratio to the target alone at the same temperature, and ``relative`` the same for
perplexity. A ratio may be null, as it is if the target alone is never toxic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fusion_detox.errors import DataError, DataFileError
from fusion_detox.files.untrusted import read_json

UNFUSED = "unfused"
_T = TypeVar("_T")
_REMEDY = "give the JSON file that `python -m benchmarks.peers` writes"


def read_peers(path: Path | str) -> dict[str, Any]:
    """The keys of a file of peers that the report uses; see the module's docstring.

    Returns:
        The same structure, checked, with ``file`` and ``sha256`` of the file.

    Raises:
        DataFileError: The file is missing, is not a regular file, or cannot be read.
        DataError: It is not JSON, or a key is missing or has an unusable value.
    """
    place = Path(path).expanduser()
    try:
        values = read_json(place)
        digest = hashlib.sha256(place.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DataFileError(
            f"the peers' results {str(place)!r} cannot be read: {error.strerror or error}; "
            f"{_REMEDY}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"the peers' results {str(place)!r} are not JSON: {error}; {_REMEDY}"
        ) from error
    reader = _Reader(place)
    document = reader.mapping("the file", values)
    entries = reader.get(document, "", "results", reader.items)
    results = [reader.result(f"results[{i}]", one) for i, one in enumerate(entries)]
    scorers: Mapping[str, Any] = reader.get(document, "", "scorers", reader.mapping)
    found: dict[str, Any] = {
        "file": place.name,
        "sha256": digest,
        "target": reader.get(document, "", "target", reader.text),
        "prompts": reader.get(document, "", "prompts", reader.count),
        "samples": reader.get(document, "", "samples", reader.count),
        "seeds": reader.get(document, "", "seeds", reader.items),
        "scorers": {
            name: {"weights": record.get("weights") if isinstance(record, Mapping) else None}
            for name, record in scorers.items()
        },
        "results": results,
    }
    if not any(map(_drawable, results)):
        raise reader.error(
            "results",
            f"{len(results)} entries, none a method with both a toxicity ratio and a relative "
            "perplexity",
            "at least one method beside the target alone",
        )
    return found


def check_shared_scorers(peers: Mapping[str, Any], scorers: Iterable[str]) -> None:
    """Refuses peers that were rated by none of a run's scorers.

    Raises:
        DataError: They have no scorer in common.
    """
    own, theirs = list(scorers), list(peers["scorers"])
    if not set(own) & set(theirs):
        raise DataError(
            f"the peers' results {peers['file']!r} have the scorers {', '.join(theirs) or 'none'}, "
            f"and this run has {', '.join(own)}, so nothing can be compared; choose a scorer that "
            "both have with --scorer, or leave --peers out"
        )


def _drawable(result: Mapping[str, Any]) -> bool:
    ratios = [one["ratio"]["ratio"] for one in result["toxicity"].values()]
    measured = any(ratio is not None for ratio in ratios)
    return result["method"] != UNFUSED and measured and result["perplexity"]["relative"] is not None


class _Reader:
    """Checks values of one file; each method takes where a value stands, and the value."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, where: str, value: object, wanted: str) -> DataError:
        shown = value if isinstance(value, str) else repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
        return DataError(
            f"the peers' results {str(self.path)!r} cannot be used: {where} must be {wanted}, but "
            f"is {shown}; {_REMEDY}"
        )

    def get(
        self, parent: Mapping[str, Any], where: str, key: str, read: Callable[[str, Any], _T]
    ) -> _T:
        place = f"{where}.{key}" if where else key
        if key not in parent:
            raise DataError(
                f"the peers' results {str(self.path)!r} cannot be used: {place} is missing; "
                f"{_REMEDY}"
            )
        return read(place, parent[key])

    def mapping(self, where: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.error(where, value, "a JSON object")
        return value

    def items(self, where: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.error(where, value, "a list with at least one entry")
        return value

    def text(self, where: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.error(where, repr(value), "a name")
        return value

    def count(self, where: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self.error(where, value, "a whole number of at least 1")
        return value

    def number(self, where: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(where, value, "a number")
        return float(value)

    def interval(self, where: str, value: Any) -> list[float | None] | None:
        """A value with the ends of its interval; ends may be unknown."""
        if value is None or (isinstance(value, list) and value and value[0] is None):
            return None
        if not isinstance(value, list) or len(value) != 3:
            raise self.error(where, value, "three numbers (a value, and its interval) or null")
        found = [one if one is None else self.number(where, one) for one in value]
        if any(one is not None and one < 0 for one in found):
            raise self.error(where, value, "at least 0")
        return found

    def result(self, where: str, value: Any) -> dict[str, Any]:
        """One method at one strength and temperature."""
        row = self.mapping(where, value)
        toxicity = self.get(row, where, "toxicity", self.mapping)
        perplexity = self.get(row, where, "perplexity", self.mapping)
        return {
            "method": self.get(row, where, "method", self.text),
            "strength": self.get(row, where, "strength", self.number),
            "temperature": self.get(row, where, "temperature", self.number),
            "toxicity": {
                name: self.rating(f"{where}.toxicity.{name}", one) for name, one in toxicity.items()
            },
            "perplexity": {
                "relative": self.get(perplexity, f"{where}.perplexity", "relative", self.interval)
            },
        }

    def rating(self, where: str, value: Any) -> dict[str, Any]:
        """How toxic one scorer found a method."""
        rating = self.mapping(where, value)
        ratio = self.get(rating, where, "ratio", self.mapping)
        return {
            "probability": self.get(rating, where, "probability", self.interval),
            "ratio": {"ratio": self.get(ratio, f"{where}.ratio", "ratio", self.interval)},
        }
