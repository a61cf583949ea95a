"""Whether runs can be compared: what differs between them besides what is to be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_detox.evaluation.report.markup import line
from fusion_detox.evaluation.report.reading import Run, at, block, rows, toxicity
from fusion_detox.evaluation.report.wording import listed, words

# What may differ in a scorer's record without making it another scorer.
_NOT_IDENTITY = {"auc", "aucs", "licence", "license", "note", "notes", "source", "url"}


@dataclass(frozen=True)
class Difference:
    """Something in which runs differ.

    Attributes:
        level: "warning" where numbers are not comparable, "note" where a reader should know.
        what: What differs, such as "prompts".
        sentence: What follows from it.
        values: By run, what it is there.
    """

    level: str
    what: str
    sentence: str
    values: Mapping[str, str]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Names of runs, numbered where two have the same."""
    found: list[str] = []
    for run in runs:
        name, count = line(run.name, 60), 1
        label = name
        while label in found:
            count += 1
            label = f"{name} ({count})"
        found.append(label)
    return found


def differences(runs: Sequence[Run]) -> list[Difference]:
    """All differences that bear on a comparison, warnings first."""
    labels = run_labels(runs)
    found = [_by(runs, labels, "warning", *check) for check in _WARNINGS]
    found += [_scorer(runs, labels, name) for name in _all_scorers(runs)]
    found += [_by(runs, labels, "note", *check) for check in _NOTES]
    kept = [difference for difference in found if difference is not None]
    kept += _missing_hashes(runs, labels)
    if not any(one.level == "warning" or one.what == "seeds" for one in kept):
        kept += _unexplained(runs, labels)
    return sorted(kept, key=lambda one: one.level != "warning")


def _by(
    runs: Sequence[Run],
    labels: Sequence[str],
    level: str,
    what: str,
    sentence: str,
    value: Callable[[Run], str],
) -> Difference | None:
    values = dict(zip(labels, map(value, runs), strict=True))
    return Difference(level, what, sentence, values) if len(set(values.values())) > 1 else None


def _prompts(run: Run) -> str:
    sets = sorted(
        ", ".join(words(item.get(key)) for key in ("name", "count", "sha256"))
        for item in rows(run.results, "prompts")
    )
    return "; ".join(sets) or "none"


def _identity(record: Mapping[str, Any]) -> str:
    """A model by its fingerprint; by its name where it has none."""
    name = line(record.get("name") or "none")
    parts = [name] if record.get("fingerprint") is None else [line(record["fingerprint"])]
    return ", ".join([*parts, *([line(record["dtype"])] if record.get("dtype") else [])])


def _all_scorers(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.scorers))


def _scorer(runs: Sequence[Run], labels: Sequence[str], name: str) -> Difference | None:
    with_it = [run for run in runs if name in run.scorers]
    named = line(name, 60)
    if len(with_it) < len(runs):
        without = [label for run, label in zip(runs, labels, strict=True) if run not in with_it]
        return Difference(
            "note",
            f"scorer {named}",
            f"Not every run was scored with {named}: {listed(without)} "
            f"{'was' if len(without) == 1 else 'were'} not.",
            {},
        )

    def version(run: Run) -> str:
        record = block(run.results, "scorers", name)
        return words({k: v for k, v in sorted(record.items()) if k not in _NOT_IDENTITY})

    sentence = f"The scorer {named} is not the same, so its numbers are not comparable."
    return _by(runs, labels, "warning", f"scorer {named}", sentence, version)


def _missing_hashes(runs: Sequence[Run], labels: Sequence[str]) -> list[Difference]:
    """What cannot be compared because it was not recorded."""
    found = []
    hashed = {
        "prompts": [all(p.get("sha256") for p in rows(run.results, "prompts")) for run in runs],
        "target": [at(run.results, "target", "fingerprint") is not None for run in runs],
    }
    for what, known in hashed.items():
        without = [label for label, there in zip(labels, known, strict=True) if not there]
        if without:
            sentence = (
                f"No hash of the {what} was recorded by {listed(without)}, so nobody can tell "
                "whether they are the same."
            )
            found.append(Difference("warning", f"hash of the {what}", sentence, {}))
    return found


def _unexplained(runs: Sequence[Run], labels: Sequence[str]) -> list[Difference]:
    """The same target, prompts, sampling and seeds, but other numbers of the target alone."""
    found = []
    for name in _all_scorers(runs):
        values = {
            label: words(measured.value)
            for run, label in zip(runs, labels, strict=True)
            if (measured := toxicity(run.base, name, "probability")) is not None
        }
        if len(set(values.values())) > 1:
            sentence = (
                f"By the scorer {line(name, 60)}, the target alone has other numbers although "
                "target, prompts, sampling and seeds are the same. Batch size, device or library "
                "versions may be the reason; differences of this size mean nothing."
            )
            found.append(Difference("note", f"target alone, {line(name, 60)}", sentence, values))
    return found


_Check = tuple[str, str, Callable[[Run], str]]  # what differs, what follows, its value in a run
_WARNINGS: tuple[_Check, ...] = (
    (
        "prompts",
        "The prompts are not the same: toxicity and perplexity are not comparable.",
        _prompts,
    ),
    (
        "sampling",
        "Continuations were sampled in another way, which by itself changes every number.",
        lambda run: words(block(run.results, "sampling")),
    ),
    (
        "threshold",
        "Another score counts as toxic: shares of toxic prompts are not comparable.",
        lambda run: words(run.threshold),
    ),
    (
        "target",
        "The targets are not the same: compare a setting with its own target alone only.",
        lambda run: _identity(block(run.results, "target")),
    ),
    (
        "perplexity model",
        "Perplexity was measured with another model and is not comparable.",
        lambda run: _identity(block(run.results, "perplexity_model")),
    ),
)
_NOTES: tuple[_Check, ...] = (
    (
        "seeds",
        "The seeds are not the same: small differences may be those of chance.",
        lambda run: words(run.results.get("seeds")),
    ),
    (
        "harmless text",
        "Effects on harmless text were measured on other text.",
        lambda run: words(at(run.primary, "harmless", "text")),
    ),
    (
        "machine",
        "The machines are not the same: speed and memory are not comparable.",
        lambda run: words(block(run.results, "machine")),
    ),
    (
        "version",
        "The runs come from other versions of fusion_detox.",
        lambda run: words(at(run.results, "versions", "fusion_detox")),
    ),
)
