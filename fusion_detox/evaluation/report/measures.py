"""The tables of a run: toxicity, text, harmless text, groups, prompts, seeds and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusion_detox.evaluation.report.markup import Html, join, line, tag
from fusion_detox.evaluation.report.reading import Run, at, block, interval, number, rows, toxicity
from fusion_detox.evaluation.report.tables import Column, Row, Value, column, settings_table, table
from fusion_detox.evaluation.report.wording import (
    cell,
    change,
    digits,
    label,
    memory,
    p_text,
    percent,
    quantity,
    span,
    verdict,
)

COMPARED = (
    column("Value", lambda v: quantity(v, 1), "Perplexity", "perplexity", "token_weighted"),
    column("Against base", lambda v: change(v, 1), "Perplexity", "perplexity", "relative"),
    column("dist-2", lambda v: quantity(v, 3), "Diversity", "diversity", "dist_2"),
    column("KL", lambda v: quantity(v, 4), "Harmless text", "harmless", "kl"),
    column("Top-1 changed", lambda v: percent(v, 1), "Harmless text", "harmless", "top1_changed"),
    column("Speed", lambda v: quantity(v, 2), "Cost", "cost", "relative"),
)
"""What a table of settings shows beside toxicity."""


def probability_columns(scorers: Sequence[str]) -> list[Column]:
    """The share of toxic prompts, a column a scorer."""
    return [_probability(scorer, line(scorer, 40), "Toxic prompts") for scorer in scorers]


def overview(run: Run) -> Html | None:
    """All settings, the measures that matter most."""
    caption = (
        "All settings, with 95 % intervals below the values. Against base: change against the "
        "target alone. KL in nats a token. Speed: as a multiple of the target's."
    )
    columns = [*probability_columns(run.scorers), *COMPARED]
    return settings_table(run, "table-overview", caption, columns)


def toxicity_tables(run: Run) -> list[Html]:
    """For each scorer, every measure of toxicity with its difference from the base."""
    found = []
    for place, scorer in enumerate(run.scorers):
        columns = [
            _probability(scorer, "Share", "Toxic prompts"),
            Column("Against base", _against(scorer, "probability"), "Toxic prompts"),
            Column("Ratio", _ratio(scorer), "Toxic prompts"),
            _tox(scorer, "expected_max", "Value", "Expected maximum"),
            Column("Against base", _against(scorer, "expected_max"), "Expected maximum"),
            _tox(scorer, "mean", "Value", "Mean score"),
            Column("Against base", _against(scorer, "mean"), "Mean score"),
            Column("Toxic continuations", _share(scorer, "fraction")),
            Column("Failed", _failed(scorer)),
        ]
        caption = f"Toxicity by the {line(scorer, 60)} scorer. Against base: fused minus base."
        found.append(settings_table(run, f"table-toxicity-{place}", caption, columns))
    return [item for item in found if item is not None]


def text_table(run: Run) -> Html | None:
    """Fluency, diversity and similarity of what was written."""
    columns = [
        column("Mean", lambda v: quantity(v, 1), "Perplexity", "perplexity", "token_weighted"),
        column("Median", lambda v: quantity(v, 1), "Perplexity", "perplexity", "median"),
        Column("Not scored", _not_scored, "Perplexity"),
        *(
            column(f"dist-{n}", lambda v: quantity(v, 3), "Diversity", "diversity", f"dist_{n}")
            for n in (1, 2, 3)
        ),
        column("Self-BLEU", lambda v: quantity(v, 3), "Diversity", "diversity", "self_bleu"),
        column("Repetition", lambda v: percent(v, 1), "Faults", "diversity", "repetition"),
        column("Empty", lambda v: percent(v, 1), "Faults", "diversity", "empty"),
        column("Degenerate", lambda v: percent(v, 1), "Faults", "diversity", "degenerate"),
        column("Tokens", lambda v: quantity(v, 1), "", "diversity", "tokens"),
        column("To prompt", lambda v: quantity(v, 3), "Similarity", "similarity", "to_prompt"),
        column("To base", lambda v: quantity(v, 3), "Similarity", "similarity", "to_base"),
    ]
    return settings_table(run, "table-text", "The text that each setting wrote", columns)


def harmless_table(run: Run) -> Html | None:
    """What each setting does to harmless text, and refusals."""
    columns = [
        column("Mean", lambda v: quantity(v, 4), "KL (nats a token)", "harmless", "kl"),
        column("Largest", lambda v: quantity(v, 2), "KL (nats a token)", "harmless", "kl_largest"),
        column("Top-1 changed", lambda v: percent(v, 1), "", "harmless", "top1_changed"),
        column("Base", lambda v: quantity(v, 3), "Loss (nats a token)", "harmless", "loss_base"),
        column("Fused", lambda v: quantity(v, 3), "Loss (nats a token)", "harmless", "loss_fused"),
        column("Made impossible", lambda v: quantity(v, 0), "", "harmless", "impossible"),
        *(
            column(name, lambda v: quantity(v, 2), "Strength used", "harmless", "strength", key)
            for name, key in (("Mean", "mean"), ("5 %", "p5"), ("50 %", "p50"), ("95 %", "p95"))
        ),
        column("Refused", lambda v: percent(v, 1), "", "refusal", "rate"),
    ]
    return settings_table(run, "table-harmless", _harmless_caption(run), columns)


def _harmless_caption(run: Run) -> str:
    text = block(run.primary, "harmless", "text")
    if not text:
        return "What each setting does to harmless text"
    texts, tokens = number(text, "texts"), number(text, "tokens")
    counts = [
        f"{digits(count, 0)} {what}"
        for count, what in ((texts, "texts"), (tokens, "tokens"))
        if count is not None
    ]
    named = [f"“{line(text['name'], 60)}”"] if text.get("name") else []
    return f"What each setting does to harmless text ({', '.join(named + counts)})"


def groups_table(setting: Mapping[str, Any], ident: str) -> Html | None:
    """Loss on the text of each group."""
    names = [("", n) for n in ("Suite", "Texts", "Tokens", "Loss, base", "Loss, fused")]
    names += [("", "Made impossible"), ("", "Change"), ("", "Ratio to control")]
    lines = []
    for group in rows(setting, "groups"):
        counts = [number(group, key) for key in ("texts", "tokens")]
        losses = [number(group, key) for key in ("loss_base", "loss_fused")]
        moved, ratio = interval(group, "change"), interval(group, "ratio")
        control = ratio is not None and ratio.value == 1 and ratio.ends is None
        cells = [
            line(group["suite"]) if group.get("suite") is not None else None,
            *(None if count is None else digits(count, 0) for count in counts),
            *(None if loss is None else digits(loss, 3) for loss in losses),
            None if (broken := number(group, "impossible")) is None else digits(broken, 0),
            cell((digits(moved.value, 3, True), span(moved, 3, signed=True))) if moved else None,
            None if ratio is None else "control" if control else cell(quantity(ratio, 3)),
        ]
        head = tag("span", line(group.get("group")), class_="name")
        worse = verdict(ratio, None, equal=1.0) == "higher"
        lines.append(Row(head, cells, "is-worse" if worse else None))
    caption = (
        f"Loss on text by and about groups at “{line(setting['name'], 60)}”, in nats a token. "
        "Change: fused minus base. Ratio: the perplexity ratio of the group over that of its "
        "suite's control; marked where its interval lies above 1."
    )
    return table(ident, caption, "Group", names, lines)


def prompts_table(run: Run) -> Html | None:
    """Toxic prompts by set of prompts, for the settings that are spoken of first."""
    sets: dict[str, None] = {}
    for setting in run.key_settings:
        sets.update(dict.fromkeys(map(str, block(setting, "by_prompts"))))
    names = [(line(s, 40), line(t["name"], 30)) for s in run.scorers for t in run.key_settings]

    def value(set_: str, scorer: str, setting: Any) -> Html | None:
        found = interval(setting, "by_prompts", set_, scorer, "probability")
        return cell(percent(found, 1)) if found else None

    lines = [
        Row(
            tag("span", line(set_), class_="name"),
            [
                value(set_, scorer, setting)
                for scorer in run.scorers
                for setting in run.key_settings
            ],
        )
        for set_ in sets
    ]
    return table("table-prompts", "Toxic prompts by set of prompts", "Prompts", names, lines)


def seeds_table(run: Run) -> Html | None:
    """Toxic prompts by seed, for the settings that are spoken of first."""
    seeds = {
        str(one.get("seed")): one.get("seed") for s in run.settings for one in rows(s, "by_seed")
    }
    names = [(line(s, 40), line(t["name"], 30)) for s in run.scorers for t in run.key_settings]

    def value(seed: Any, scorer: str, setting: Any) -> Html | None:
        for one in rows(setting, "by_seed"):
            found = interval(one, scorer, "probability")
            if one.get("seed") == seed and found is not None:
                return cell(percent(found, 1))
        return None

    lines = [
        Row(
            tag("span", line(name), class_="name"),
            [
                value(seed, scorer, setting)
                for scorer in run.scorers
                for setting in run.key_settings
            ],
        )
        for name, seed in seeds.items()
    ]
    return table("table-seeds", "Toxic prompts by seed", "Seed", names, lines)


def cost_table(run: Run) -> Html | None:
    """Speed and memory."""

    def bytes_(setting: Mapping[str, Any]) -> str | None:
        found = memory(number(setting, "cost", "peak_memory_bytes"))
        return None if found is None else cell((found, None))

    columns = [
        column("Tokens a second", lambda v: quantity(v, 1), "", "cost", "tokens_per_second"),
        column("Speed against base", lambda v: quantity(v, 2), "", "cost", "relative"),
        Column("Peak memory", bytes_),
        column("Seconds in all", lambda v: quantity(v, 1), "", "cost", "seconds"),
    ]
    return settings_table(run, "table-cost", "What each setting costs", columns)


def _probability(scorer: str, name: str, group: str) -> Column:
    return Column(name, _share(scorer, "probability"), group)


def _tox(scorer: str, measure: str, name: str, group: str) -> Column:
    def value(setting: Mapping[str, Any]) -> str | None:
        found = toxicity(setting, scorer, measure)
        return cell(quantity(found, 3)) if found else None

    return Column(name, value, group)


def _share(scorer: str, measure: str) -> Value:
    def value(setting: Mapping[str, Any]) -> str | None:
        found = toxicity(setting, scorer, measure)
        return cell(percent(found, 1)) if found else None

    return value


def _against(scorer: str, measure: str) -> Value:
    scale, places = (100, 1) if measure == "probability" else (1, 3)

    def value(setting: Mapping[str, Any]) -> str | None:
        found = interval(setting, "against_base", scorer, measure, "difference")
        if found is None:
            return None
        p_value = number(setting, "against_base", scorer, measure, "p_value")
        shown = digits(found.value * scale, places, True), span(found, places, scale, True)
        chance = verdict(found, p_value) == "unclear"
        notes = [None if p_value is None else p_text(p_value), "may be chance" if chance else None]
        note = ", ".join(filter(None, notes))
        return join([cell(shown), tag("span", note, class_="i") if note else None])

    return value


def _ratio(scorer: str) -> Value:
    def value(setting: Mapping[str, Any]) -> str | None:
        found = interval(setting, "against_base", scorer, "probability", "ratio")
        return cell(quantity(found, 2)) if found else None

    return value


def _failed(scorer: str) -> Value:
    def value(setting: Mapping[str, Any]) -> str | None:
        found = number(setting, "toxicity", scorer, "toxicity", "failed")
        return None if found is None else digits(found, 0)

    return value


def _not_scored(setting: Mapping[str, Any]) -> str | None:
    found = number(setting, "perplexity", "not_scored")
    if found is None:
        return None
    why = at(setting, "perplexity", "why")
    count = digits(found, 0)
    return cell((count, label(why) if why and found else None))
