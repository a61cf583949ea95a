"""What the run found, in sentences: also where it is chance, worse, or was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fusion_detox.evaluation.report import costs
from fusion_detox.evaluation.report.costs import Statement
from fusion_detox.evaluation.report.markup import Html, join, line, tag
from fusion_detox.evaluation.report.reading import (
    Interval,
    Run,
    at,
    interval,
    number,
    toxicity,
)
from fusion_detox.evaluation.report.wording import (
    NARROW,
    absolute,
    bracket,
    change,
    digits,
    fitting,
    label,
    listed,
    p_text,
    percent,
    span,
    together,
    verdict,
    with_interval,
)


def statements(run: Run) -> list[Statement]:
    """What a reader should know first, the most important sentence first."""
    if run.primary is None:
        return list(_without_fusion(run))
    found = [_toxicity(run, scorer) for scorer in run.scorers]
    found += [costs.perplexity(run), costs.harmless(run), costs.groups(run), costs.refusal(run)]
    found += [_word_filter(run), costs.cost(run), _scorer_quality(run)]
    return [statement for statement in found if statement is not None]


def verdicts(run: Run) -> dict[str, str]:
    """For each scorer what its toxicity probability shows, as ``wording.verdict`` says it."""
    return {
        scorer: verdict(*_difference(run.primary, scorer))
        for scorer in run.scorers
        if toxicity(run.primary, scorer, "probability")
    }


def title(run: Run) -> str:
    """The finding in one or two sentences: what is gained, and what is lost."""
    if run.primary is None:
        return "No fusion setting was measured in this run."
    by: dict[str, list[str]] = {}
    for scorer, result in verdicts(run).items():
        by.setdefault(result, []).append(line(scorer, 40))
    if not by:
        return "This run did not measure toxicity."
    said = {
        "lower": "fusion lowers toxicity according to",
        "higher": "fusion raises toxicity according to",
        "unclear": "no effect is shown by",
        "untested": "no comparison with the target alone was made by",
    }
    parts = [
        f"{opening} the {listed(by[result])} scorer{'s' if len(by[result]) > 1 else ''}"
        for result, opening in said.items()
        if result in by
    ]
    text = "; ".join(parts)
    return " ".join([f"{text[0].upper()}{text[1:]}.", *costs.prices(run)])


def _difference(setting: Any, scorer: str) -> tuple[Interval | None, float | None]:
    path = ("against_base", scorer, "probability")
    return interval(setting, *path, "difference"), number(setting, *path, "p_value")


def _lead_to(run: Run) -> str:
    if run.samples is None:
        return "lead to a toxic continuation"
    if run.samples == 1:
        return "lead to a toxic continuation (one a prompt)"
    return f"lead to at least one toxic continuation of {run.samples}"


def _toxicity(run: Run, scorer: str) -> Statement | None:
    fused = toxicity(run.primary, scorer, "probability")
    base = toxicity(run.base, scorer, "probability")
    if fused is None or run.primary is None:
        return None
    value, ends = percent(fused, together([fused, base], 100))
    opening = join(
        [
            *("According to the ", tag("b", line(scorer, 60)), " scorer, "),
            *(tag("strong", value), " of prompts", bracket(ends), " ", _lead_to(run)),
            *(" at the setting “", line(run.primary["name"], 60), "”"),
        ]
    )
    if base is None:
        return Statement(join([opening, ". The target alone was not measured."]), "unclear")
    opening = join(
        [opening, ", instead of ", with_interval(percent(base, together([fused, base], 100)))]
    )
    opening = join([opening, " without fusion"])
    difference, p_value = _difference(run.primary, scorer)
    result = verdict(difference, p_value)
    if fused.value == base.value == 0:
        return Statement(join([opening, ". These prompts cannot show an effect."]), "unclear")
    if difference is None or result == "untested":
        return Statement(
            join([opening, ". Whether the difference could be chance was not tested."]), "unclear"
        )
    tested = "" if p_value is None else f" ({p_text(p_value)})"
    if result == "unclear":
        places = fitting(difference, 100, most=2)
        ends = span(difference, places, 100, signed=True)
        text = join(
            [
                *(opening, ". The difference of ", digits(difference.value * 100, places, True)),
                *(f"{NARROW}percentage points", bracket(ends), tested, " may be chance."),
            ]
        )
        return Statement(text, "unclear")
    smaller = absolute(difference)
    places = fitting(smaller, 100, most=2)
    much = join(
        [
            tag("strong", digits(smaller.value * 100, places)),
            f" percentage points {'fewer' if result == 'lower' else 'more'}",
            *(bracket(span(smaller, places, 100)), tested),
        ]
    )
    end = "." if result == "lower" else ": fusion made it worse."
    return Statement(
        join([opening, ": ", much, end]), {"lower": "good", "higher": "bad"}.get(result, "plain")
    )


def _word_filter(run: Run) -> Statement | None:
    parts = []
    for scorer in run.scorers:
        found = toxicity(run.word_filter, scorer, "probability")
        fused = toxicity(run.primary, scorer, "probability")
        if found is None:
            continue
        beside = f" ({_beside(fused, found)})" if fused is not None else ""
        text = [with_interval(percent(found)), f" by the {line(scorer, 60)} scorer", beside]
        parts.append(join(text))
    if not parts:
        return Statement(Html("No word filter was measured for comparison."), "unclear")
    text = ["For comparison, with a plain word filter it is ", join(parts, " and ")]
    relative = interval(run.word_filter, "perplexity", "relative")
    if relative is not None:
        text += ["; perplexity changes by ", with_interval(change(relative))]
    return Statement(join([*text, "."]))


def _beside(fused: Interval, other: Interval) -> str:
    more = "more" if other.value > fused.value else "less"
    if fused.ends is None or other.ends is None:
        return (
            "the same as with fusion" if fused.value == other.value else f"{more} than with fusion"
        )
    if fused.ends[1] < other.ends[0] or other.ends[1] < fused.ends[0]:
        return f"{more} than with fusion, the intervals do not overlap"
    return "the interval overlaps with that of fusion"


def _scorer_quality(run: Run) -> Statement:
    if len(run.scorers) == 1:
        text = "Only one scorer was used, so what it overlooks goes unnoticed."
    else:
        text = "The scorers are programs, not people; where they disagree, neither is the truth."
    auc = at(run.results, "scorers", run.main_scorer or "", "auc")
    known: list[tuple[object, float]] = []
    if isinstance(auc, Mapping):
        known = [(name, value) for name in auc if (value := number(auc, name)) is not None]
    elif (value := number({"": auc}, "")) is not None:
        known = [("its test data", value)]
    if known and run.main_scorer:
        name, value = known[0]
        text += (
            f" The {line(run.main_scorer, 60)} scorer's AUC on {label(name)} "
            f"is {digits(value, 2)} (1 is perfect, 0.5 is guessing)."
        )
    return Statement(join([text]))


def _without_fusion(run: Run) -> Iterator[Statement]:
    for scorer in run.scorers:
        for setting in run.key_settings:
            found = toxicity(setting, scorer, "probability")
            if found is not None:
                value, ends = percent(found)
                yield Statement(
                    join(
                        [
                            *("According to the ", tag("b", line(scorer, 60)), " scorer, "),
                            *(tag("strong", value), " of prompts", bracket(ends), " "),
                            *(_lead_to(run), " at the setting “", line(setting["name"], 60), "”."),
                        ]
                    )
                )
