"""What fusion costs, in sentences: fluency, harmless text, groups, refusals, speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusion_detox.evaluation.report.markup import Html, join, line, tag
from fusion_detox.evaluation.report.reading import Interval, Run, interval, number, rows
from fusion_detox.evaluation.report.wording import (
    bracket,
    change,
    digits,
    fitting,
    listed,
    percent,
    quantity,
    strong,
    verdict,
    with_interval,
)


@dataclass(frozen=True)
class Statement:
    """A sentence or two, and what they mean: "good", "bad", "unclear" or "plain"."""

    text: Html
    tone: str = "plain"


def prices(run: Run) -> Iterator[str]:
    """Sentences on what is lost, for the title."""
    relative = interval(run.primary, "perplexity", "relative")
    if relative is not None and verdict(relative, None, equal=1.0) == "higher":
        yield f"Perplexity rises by {change(relative)[0].lstrip('+')}."
    found = compared_groups(run.primary)
    worse = [ratio for _, ratio in found if verdict(ratio, None, equal=1.0) == "higher"]
    if worse:
        yield f"Text of {len(worse)} of {len(found)} groups loses more than its control."


def perplexity(run: Run) -> Statement | None:
    """Whether the text became less fluent."""
    fused = interval(run.primary, "perplexity", "token_weighted")
    relative = interval(run.primary, "perplexity", "relative")
    base = interval(run.base, "perplexity", "token_weighted")
    if fused is None:
        return Statement(Html("The perplexity of the text was not measured."), "unclear")
    if relative is None:
        instead = join([", instead of ", strong(quantity(base))]) if base else ""
        text = join(["The perplexity of the text is ", with_interval(quantity(fused)), instead])
        return Statement(join([text, "."]))
    places = max(fitting(fused), fitting(base) if base else 0)
    numbers = (
        f" (from {digits(base.value, places)} to {digits(fused.value, places)})" if base else ""
    )
    result = verdict(relative, None, equal=1.0)
    if result == "unclear":
        shown = with_interval(change(relative))
        parts = ["The perplexity of the text changes by ", shown, numbers, ", which may be chance."]
        return Statement(join(parts))
    rises = relative.value >= 1
    value, ends = change(relative if rises else _turned(relative))
    shown = join([tag("strong", value.lstrip("+")), bracket(ends and ends.replace("+", ""))])
    parts = [f"The perplexity of the text {'rises' if rises else 'falls'} by ", shown, numbers]
    end = "; whether this could be chance was not tested." if result == "untested" else "."
    return Statement(join([*parts, end]), "bad" if rises else "plain")


def _turned(ratio: Interval) -> Interval:
    """A fall as a rise of the same size: 0.9 becomes 1.1."""
    ends = ratio.ends
    return Interval(2 - ratio.value, *((2 - ends[1], 2 - ends[0]) if ends else (None, None)))


def harmless(run: Run) -> Statement | None:
    """What happens to harmless text."""
    kl = interval(run.primary, "harmless", "kl")
    if kl is None:
        return Statement(Html("What fusion does to harmless text was not measured."), "unclear")
    text: list[object] = [
        "On harmless text, the next-token distribution moves by ",
        strong(quantity(kl)),
    ]
    text += [" nats a token", bracket(quantity(kl)[1]), " (KL)"]
    top1 = interval(run.primary, "harmless", "top1_changed")
    if top1 is not None:
        shown = percent(top1)
        text += [", and the most probable token changes at ", strong(shown), " of positions"]
        text += [bracket(shown[1])]
    broken = number(run.primary, "harmless", "impossible")
    if broken:
        text.append(f"; {digits(broken, 0)} of its tokens become impossible")
    return Statement(join([*text, "."]), "bad" if broken else "plain")


def groups(run: Run) -> Statement:
    """Whether the text of groups loses more than its control."""
    found = compared_groups(run.primary)
    if not found:
        known = "were not measured" if not rows(run.primary, "groups") else "have no control"
        text = Html(f"Effects on text by and about particular groups {known}.")
        return Statement(text, "unclear")
    ratios = [(line(group.get("group"), 60), ratio) for group, ratio in found if ratio is not None]
    broken = [line(group.get("group"), 60) for group, _ in found if number(group, "impossible")]
    worse = sorted(
        (item for item in ratios if verdict(item[1], None, equal=1.0) == "higher"),
        key=lambda item: -item[1].value,
    )
    count = f"{len(found)} group{'' if len(found) == 1 else 's'}"
    note = " (intervals not corrected for the number of groups)" if len(found) > 1 else ""
    parts: list[object] = [f"None of {count} is shown to lose more than its control text", note]
    if worse:
        named = [
            join([name, " (ratio ", with_interval(quantity(ratio, 3)), ")"])
            for name, ratio in worse[:3]
        ]
        verb = "loses more than its" if len(worse) == 1 else "lose more than their"
        parts = [strong((str(len(worse)), None)), f" of {count} {verb} control text", note, ": "]
        parts += [join(named, ", "), f" and {len(worse) - 3} more" if len(worse) > 3 else None]
    if broken:
        parts.append(f"; fusion makes words of {listed(broken)} impossible")
    return Statement(join([*parts, "."]), "bad" if worse or broken else "plain")


def compared_groups(setting: Any) -> list[tuple[Mapping[str, Any], Interval | None]]:
    """Groups with their ratio to the control; without the control itself, which has 1."""
    found = [(group, interval(group, "ratio")) for group in rows(setting, "groups")]
    return [
        (group, ratio)
        for group, ratio in found
        if (ratio is not None and not (ratio.value == 1 and ratio.ends is None))
        or number(group, "impossible")
    ]


def refusal(run: Run) -> Statement | None:
    """How many harmless requests are refused."""
    fused = interval(run.primary, "refusal", "rate")
    if fused is None:
        return None
    base = interval(run.base, "refusal", "rate")
    instead = [", instead of ", with_interval(percent(base)), " without fusion"] if base else []
    text: list[object] = [
        with_interval(percent(fused)),
        " of harmless requests that sound unsafe are refused",
    ]
    return Statement(join([*text, *instead, "."]))


def cost(run: Run) -> Statement | None:
    """How fast it decodes."""
    relative = number(run.primary, "cost", "relative")
    speed = number(run.primary, "cost", "tokens_per_second")
    if relative is None:
        return None
    text: list[object] = [
        "Decoding runs at ",
        tag("strong", digits(relative, 2)),
        " times the target's speed",
    ]
    if speed is not None:
        text.append(f" ({digits(speed, 0)} tokens a second)")
    return Statement(join([*text, "."]))
