"""Pairs of continuations with and without fusion, hidden until the reader asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusion_detox.evaluation.report.markup import Html, join, line, plain, tag
from fusion_detox.evaluation.report.reading import Run, block, number, rows
from fusion_detox.evaluation.report.wording import digits

_KINDS = (
    ("best", "best", "where toxicity fell most"),
    ("worst", "worst", "where it rose most"),
)


def examples(run: Run) -> Html | None:
    """The best and worst pairs of every setting that has some; None if none has."""
    found = block(run.results, "examples")
    names = [str(name) for name in found if any(rows(found, str(name), k) for k, _, _ in _KINDS)]
    if not names:
        return None
    first = str(run.primary["name"]) if run.primary else names[0]
    names.sort(key=lambda name: name != first)
    filters = {str(s["name"]) for s in run.settings if s.get("kind") == "wordfilter"}
    parts: list[Html] = []
    for place, name in enumerate(names):
        by = "with the word filter" if name in filters else "with fusion"
        inner = join(
            _column(
                rows(found, name, key),
                f"{place}-{key}",
                word,
                f"{why}, at “{line(name, 60)}”",
                by,
            )
            for key, word, why in _KINDS
        )
        inner = tag("div", inner, class_="pairs")
        if place == 0:
            parts.append(inner)
        else:
            summary = tag("summary", "Pairs of the setting “", line(name, 80), "”")
            parts.append(tag("details", summary, inner))
    warning = tag(
        "p",
        tag("strong", "Content warning. "),
        "These texts were written by a language model and may be offensive, hateful or sexual. "
        "They are hidden until you open them, one by one or all at once.",
        class_="warning",
    )
    switch = tag(
        "p",
        tag(
            "button",
            tag("span", class_="knob", aria_hidden="true"),
            "Show all texts",
            type="button",
            role="switch",
            aria_checked="false",
            id="show-all",
        ),
    )
    without = tag("noscript", tag("p", "Opening them needs scripts, which are turned off here."))
    return join([warning, switch, without, *parts])


def _column(pairs: list[Mapping[str, Any]], ident: str, word: str, about: str, by: str) -> Html:
    count = f"{len(pairs)} " if len(pairs) > 1 else ""
    heading = tag("h3", f"The {count}{word}", tag("span", f" {about}"))
    if not pairs:
        return tag("section", heading, tag("p", "There are none.", class_="caption"))
    cards = [
        _card(pair, f"pair-{ident}-{place}", f"{word} pair {place + 1}", by)
        for place, pair in enumerate(pairs)
    ]
    return tag("section", heading, tag("ol", *cards))


def _card(pair: Mapping[str, Any], ident: str, name: str, by: str) -> Html:
    before, after = number(pair, "base_score"), number(pair, "fused_score")
    scores = [
        tag("span", f"{word} ", tag("b", "–" if score is None else digits(score, 2)))
        for word, score in (("target alone", before), (by, after))
    ]
    texts = [
        tag("div", tag("dt", word), tag("dd", _text(pair.get(key)), dir="auto"))
        for word, key in (
            ("Prompt", "prompt"),
            ("Target alone", "base"),
            (by.capitalize(), "fused"),
        )
    ]
    button = tag(
        "button",
        "Show",
        tag("span", f" {name}", class_="hidden"),
        type="button",
        aria_expanded="false",
        aria_controls=ident,
    )
    bar = tag("div", tag("p", join(scores, " → "), class_="scores"), button, class_="bar")
    # inert: neither found by a screen reader nor reached by the keyboard before it is opened.
    return tag(
        "li",
        bar,
        tag("div", tag("dl", *texts, inert=True), id=ident, class_="veil"),
        class_="pair",
    )


def _text(value: object) -> Html:
    text = "" if value is None else plain(value)
    return tag("span", text) if text.strip() else tag("span", "(empty)", class_="none")
