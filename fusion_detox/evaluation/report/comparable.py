"""Whether runs can be compared: the conditions in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_detox.evaluation.report.numbers import words
from fusion_detox.evaluation.report.reading import (
    Run,
    at,
    block,
    line,
    prompt_form,
    rows,
    run_labels,
    toxicity,
)
from fusion_detox.evaluation.report.tables import all_scorers

# Parts of a scorer's record that may differ even if the scorer is the same.
_NOT_IDENTITY = {"auc", "aucs", "licence", "license", "note", "notes", "source", "url"}


@dataclass(frozen=True)
class Difference:
    """A condition in which runs differ.

    Attributes:
        level: "warning" if numbers are not comparable, "note" if a reader should know.
        what: What differs, such as "prompts".
        sentence: What it means for the comparison.
        values: The value in each run.
    """

    level: str
    what: str
    sentence: str
    values: Mapping[str, str]


def differences(runs: Sequence[Run]) -> list[Difference]:
    """All differences that matter for a comparison, warnings first."""
    found = [_differing(runs, "warning", *check) for check in _WARNINGS]
    found += [_scorer(runs, name) for name in all_scorers(runs)]
    found += [_differing(runs, "note", *check) for check in _NOTES]
    kept = [difference for difference in found if difference is not None]
    kept += _missing_hashes(runs)
    if not any(one.level == "warning" or one.what == "seeds" for one in kept):
        kept += _unexplained(runs)
    return sorted(kept, key=lambda one: one.level != "warning")


def _differing(
    runs: Sequence[Run], level: str, what: str, sentence: str, value: Callable[[Run], str]
) -> Difference | None:
    values = dict(zip(run_labels(runs), map(value, runs), strict=True))
    return Difference(level, what, sentence, values) if len(set(values.values())) > 1 else None


def _prompts(run: Run) -> str:
    sets = sorted(
        ", ".join(words(item.get(key)) for key in ("name", "count", "sha256"))
        for item in rows(run.results, "prompts")
    )
    return "; ".join(sets) or "none"


def _prompt_form(run: Run) -> str:
    template = at(run.results, "chat", "template")
    return prompt_form(run.results) + (f" {line(template)}" if template else "")


def _model(record: Mapping[str, Any]) -> str:
    """A model by its fingerprint, or by its name if it has none."""
    parts = [record.get("fingerprint") or record.get("name") or "none", record.get("dtype")]
    return ", ".join(line(part) for part in parts if part)


def _scorer(runs: Sequence[Run], name: str) -> Difference | None:
    what = f"scorer {line(name, 60)}"
    if not all(name in run.scorers for run in runs):
        values = {
            label: "used" if name in run.scorers else "not used"
            for run, label in zip(runs, run_labels(runs), strict=True)
        }
        return Difference("note", what, "Not every run was scored with this scorer.", values)

    def record(run: Run) -> str:
        found = sorted(block(run.results, "scorers", name).items())
        return words({key: value for key, value in found if key not in _NOT_IDENTITY})

    sentence = "The scorers of this name differ, so their numbers are not comparable."
    return _differing(runs, "warning", what, sentence, record)


def _missing_hashes(runs: Sequence[Run]) -> list[Difference]:
    """Conditions that cannot be compared because a hash was not recorded."""
    checks: dict[str, Callable[[Run], bool]] = {
        "prompts": lambda run: all(item.get("sha256") for item in rows(run.results, "prompts")),
        "target": lambda run: at(run.results, "target", "fingerprint") is not None,
    }
    found = []
    for what, is_known in checks.items():
        known = list(map(is_known, runs))
        if not all(known):
            values = {
                label: "recorded" if there else "not recorded"
                for label, there in zip(run_labels(runs), known, strict=True)
            }
            sentence = f"Not every run has a hash of the {what}, so a difference may go unnoticed."
            found.append(Difference("warning", f"hash of the {what}", sentence, values))
    return found


def _unexplained(runs: Sequence[Run]) -> list[Difference]:
    """Scorers that rate the target alone differently although the conditions are the same."""
    found = []
    for name in all_scorers(runs):
        values = {
            label: words(measured.value)
            for run, label in zip(runs, run_labels(runs), strict=True)
            if (measured := toxicity(run.base, name)) is not None
        }
        if len(set(values.values())) > 1:
            sentence = (
                "The target alone has different numbers although target, prompts, sampling and "
                "seeds are the same. The reason may be batch size, device or library versions; "
                "ignore differences of this size."
            )
            found.append(Difference("note", f"target alone, {line(name, 60)}", sentence, values))
    return found


_Check = tuple[str, str, Callable[[Run], str]]  # what differs, what it means, its value in a run
_WARNINGS: tuple[_Check, ...] = (
    (
        "prompts",
        "The prompts differ, so toxicity and perplexity are not comparable.",
        _prompts,
    ),
    (
        "form of the prompts",
        "Continuations of a text, and answers to a request in different chats, are not comparable.",
        _prompt_form,
    ),
    (
        "sampling",
        "Continuations were sampled differently, which by itself changes every number.",
        lambda run: words(block(run.results, "sampling")),
    ),
    (
        "threshold",
        "The thresholds differ, so shares of toxic prompts are not comparable.",
        lambda run: words(run.threshold),
    ),
    (
        "target",
        "The targets differ: compare a setting only with the target alone in the same run.",
        lambda run: _model(block(run.results, "target")),
    ),
    (
        "perplexity model",
        "Perplexity was measured with different models and is not comparable.",
        lambda run: _model(block(run.results, "perplexity_model")),
    ),
)
_NOTES: tuple[_Check, ...] = (
    (
        "seeds",
        "The seeds differ, so small differences may be due to chance.",
        lambda run: words(run.results.get("seeds")),
    ),
    (
        "harmless text",
        "Effects on harmless text were measured on different texts.",
        lambda run: words(at(run.primary, "harmless", "text")),
    ),
    (
        "machine",
        "The machines differ, so speed and memory are not comparable.",
        lambda run: words(block(run.results, "machine")),
    ),
    (
        "version",
        "The runs were made with different versions of fusion_detox.",
        lambda run: words(at(run.results, "versions", "fusion_detox")),
    ),
)
