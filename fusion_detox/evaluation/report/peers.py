"""Results of other methods, measured elsewhere: which are shown, and how their run differed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusion_detox.evaluation.peers import UNFUSED
from fusion_detox.evaluation.report.numbers import words
from fusion_detox.evaluation.report.reading import Run, at, block, line, number, rows


def peer_results(run: Run) -> list[Mapping[str, Any]]:
    """The methods' results at the run's temperature, or at all if none was measured at it."""
    methods = [
        one
        for one in rows(run.results, "peers", "results")
        if one.get("method") not in (None, UNFUSED)
        and number(one, "strength") is not None
        and number(one, "temperature") is not None
    ]
    own = number(run.results, "sampling", "temperature")
    return [one for one in methods if number(one, "temperature") == own] or methods


def is_mixed(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether results have different temperatures."""
    return len({number(one, "temperature") for one in results}) > 1


def sentences(run: Run) -> list[str]:
    """What a reader must know about the peers; empty if the run has none."""
    peers = block(run.results, "peers")
    if not peers:
        return []
    file = line(peers.get("file"), 60)
    pairs = {
        "target": (line(peers.get("target")), line(at(run.results, "target", "name"))),
        "number of prompts": (words(peers.get("prompts")), words(run.prompts)),
        "continuations per prompt and seed": (
            words(peers.get("samples")),
            words(at(run.results, "sampling", "samples")),
        ),
        "seeds": (words(peers.get("seeds")), words(run.results.get("seeds"))),
        "threshold": ("0.5", f"{run.threshold:g}"),
        "form of the prompts": (
            "plain text",
            "plain text" if at(run.results, "chat") is None else "chat",
        ),
        "temperature": (
            words(sorted({number(one, "temperature") for one in peer_results(run)} - {None})),
            words(number(run.results, "sampling", "temperature")),
        ),
    }
    differ = [
        f"{name} {there} (here {here})" for name, (there, here) in pairs.items() if there != here
    ]
    if not set(run.scorers) & set(block(peers, "scorers")):
        theirs = words(list(block(peers, "scorers")))
        missing = (
            f"Other methods are not shown, because {file} and this run have no scorer in common. "
            f"The scorers there: {theirs}."
        )
        return [missing]
    source = (
        f"The hollow points are not from this run: {file} has them, measured in another run on its "
        "own prompts. Compare only ratios to the target alone; small differences mean nothing."
    )
    found = [source]
    if differ:
        found.append(f"That run differs: {'; '.join(differ)}.")
    other = [line(name, 60) for name in run.scorers if _weights_differ(run, name)]
    if other:
        found.append(f"Scorers of the same name but with other weights: {', '.join(other)}.")
    return found


def _weights_differ(run: Run, scorer: str) -> bool:
    ours = at(run.results, "scorers", scorer, "weights")
    theirs = at(run.results, "peers", "scorers", scorer, "weights")
    return None not in (ours, theirs) and ours != theirs
