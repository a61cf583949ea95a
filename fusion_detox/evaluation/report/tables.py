"""The tables of the report, as data that the templates lay out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from jinja2.filters import do_filesizeformat

from fusion_detox.evaluation.report.findings import is_control, state
from fusion_detox.evaluation.report.numbers import (
    Shown,
    change,
    digits,
    label,
    p_text,
    percent,
    quantity,
    words,
)
from fusion_detox.evaluation.report.reading import (
    Interval,
    Run,
    at,
    block,
    interval,
    line,
    number,
    rows,
    run_labels,
)

Variant = Mapping[str, Any]


class Column(NamedTuple):
    """A column: neighbours with the same ``group`` share a heading above theirs."""

    group: str
    name: str
    value: Callable[[Variant], Shown | None]


@dataclass(frozen=True)
class Row:
    """A row: its heading, a second line below it, its cells and its CSS class.

    Without cells, it is a heading for the rows that follow. A cell that is None was not measured.
    """

    head: str
    what: str = ""
    cells: Sequence[Shown | None] = ()
    css: str = ""


@dataclass(frozen=True)
class Table:
    """A table without its empty columns.

    Attributes:
        ident: The caption's id, unique on the page.
        caption: What the table shows.
        corner: The heading of the first column.
        heads: The headings of the other columns, as pairs of group ("" for none) and names.
        rows: The rows.
    """

    ident: str
    caption: str
    corner: str
    heads: Sequence[tuple[str, Sequence[str]]]
    rows: Sequence[Row]


def _table(
    ident: str, caption: str, corner: str, names: Sequence[tuple[str, str]], lines: Sequence[Row]
) -> Table | None:
    """A table of the columns that hold a value; None if no column does."""
    kept = [i for i in range(len(names)) if any(row.cells and row.cells[i] for row in lines)]
    if not kept:
        return None
    named = groupby((names[i] for i in kept), key=lambda name: name[0])
    heads = [(group, [name for _, name in members]) for group, members in named]
    full = [
        Row(row.head, row.what, [row.cells[i] for i in kept] if row.cells else (), row.css)
        for row in lines
    ]
    return Table(ident, caption, corner, heads, full)


def describe(variant: Variant) -> str:
    """What a variant is, in a few words."""
    kind, config = variant.get("kind"), block(variant, "config")
    if kind == "base":
        return "target alone"
    if kind == "wordfilter":
        return "word filter"
    keys = ("strength", "kl_budget", "context_kl", "context_threshold", "context_limit")
    named = [(key, number(config, key)) for key in keys]
    parts = [line(config["rule"], 20)] if config.get("rule") else []
    parts += [f"{label(key)} {value:g}" for key, value in named if value is not None]
    return ", ".join(parts) or line(words(config), 80)


def _row(run: Run, variant: Variant, columns: Sequence[Column]) -> Row:
    css = "is-base" if variant is run.base else "is-primary" if variant is run.primary else ""
    name, what = line(variant["name"]), describe(variant)
    return Row(
        name, "" if what == name else what, [column.value(variant) for column in columns], css
    )


def _variants(run: Run, ident: str, caption: str, columns: Sequence[Column]) -> Table | None:
    """A row for each variant that has any of the values."""
    lines = [_row(run, variant, columns) for variant in run.variants]
    names = [(column.group, column.name) for column in columns]
    return _table(ident, caption, "Setting", names, [row for row in lines if any(row.cells)])


def _at(show: Callable[[Interval, int], Shown], decimals: int, *path: str) -> Any:
    def value(variant: Variant) -> Shown | None:
        found = interval(variant, *path)
        return None if found is None else show(found, decimals)

    return value


def _toxic(name: str, scorer: str, group: str = "Toxic prompts") -> Column:
    return Column(group, name, _at(percent, 1, "toxicity", scorer, "toxicity", "probability"))


_COMPARED = (
    Column("Perplexity", "Value", _at(quantity, 1, "perplexity", "token_weighted")),
    Column("Perplexity", "Against base", _at(change, 1, "perplexity", "relative")),
    Column("Diversity", "dist-2", _at(quantity, 3, "diversity", "dist_2")),
    Column("Harmless text", "KL", _at(quantity, 4, "harmless", "kl")),
    Column("Harmless text", "Top-1 changed", _at(percent, 1, "harmless", "top1_changed")),
    Column("Cost", "Speed", _at(quantity, 2, "cost", "relative")),
)


def overview(run: Run) -> Table | None:
    """All variants with the measures that matter most."""
    caption = (
        "All settings, with 95 % intervals below the values. Against base: change relative to the "
        "target alone. KL in nats per token. Speed: as a multiple of the target's."
    )
    columns = [_toxic(line(scorer, 40), scorer) for scorer in run.scorers]
    return _variants(run, "table-overview", caption, [*columns, *_COMPARED])


def toxicity_table(run: Run, scorer: str) -> Table | None:
    """Every measure of toxicity by one scorer, with its difference from the base."""

    def against(name: str, measure: str, show: Callable[[Interval], Shown]) -> Column:
        def value(variant: Variant) -> Shown | None:
            found = interval(variant, "against_base", scorer, measure, "difference")
            if found is None:
                return None
            p_value = number(variant, "against_base", scorer, measure, "p_value")
            shown = "not tested" if p_value is None else p_text(p_value)
            clear = state(found, p_value) != "no clear difference"
            return show(found)._replace(note=shown if clear else f"{shown}, no clear difference")

        return Column(name, "Against base", value)

    read = ("toxicity", scorer, "toxicity")
    points = partial(quantity, decimals=1, scale=100, signed=True)
    scores = partial(quantity, decimals=3, signed=True)
    columns = [
        _toxic("Share", scorer),
        against("Toxic prompts", "probability", points),
        Column(
            "Toxic prompts",
            "Ratio",
            _at(quantity, 2, "against_base", scorer, "probability", "ratio"),
        ),
        Column("Expected maximum", "Value", _at(quantity, 3, *read, "expected_max")),
        against("Expected maximum", "expected_max", scores),
        Column("Mean score", "Value", _at(quantity, 3, *read, "mean")),
        against("Mean score", "mean", scores),
        Column("", "Toxic continuations", _at(percent, 1, *read, "fraction")),
        Column("", "Failed", _at(quantity, 0, *read, "failed")),
    ]
    caption = f"Toxicity by the {line(scorer, 60)} scorer. Against base: fused minus base."
    return _variants(run, f"table-toxicity-{run.scorers.index(scorer)}", caption, columns)


def text_table(run: Run) -> Table | None:
    """Fluency, diversity and similarity of the continuations."""

    def not_scored(variant: Variant) -> Shown | None:
        found, why = number(variant, "perplexity", "not_scored"), at(variant, "perplexity", "why")
        return None if found is None else Shown(digits(found, 0), note=words(why) if found else "")

    columns = [
        Column("Perplexity", "Mean", _at(quantity, 1, "perplexity", "token_weighted")),
        Column("Perplexity", "Median", _at(quantity, 1, "perplexity", "median")),
        Column("Perplexity", "Not scored", not_scored),
        *(
            Column("Diversity", f"dist-{n}", _at(quantity, 3, "diversity", f"dist_{n}"))
            for n in (1, 2, 3)
        ),
        Column("Diversity", "Self-BLEU", _at(quantity, 3, "diversity", "self_bleu")),
        *(
            Column("Faults", name.capitalize(), _at(percent, 1, "diversity", name))
            for name in ("repetition", "empty", "degenerate")
        ),
        Column("", "Tokens", _at(quantity, 1, "diversity", "tokens")),
        Column("Similarity", "To prompt", _at(quantity, 3, "similarity", "to_prompt")),
        Column("Similarity", "To base", _at(quantity, 3, "similarity", "to_base")),
    ]
    return _variants(run, "table-text", "The continuations of each setting", columns)


def harmless_table(run: Run) -> Table | None:
    """What each variant does to harmless text, and how often it refuses harmless requests."""
    kl, loss = "KL (nats per token)", "Loss (nats per token)"
    columns = [
        Column(kl, "Mean", _at(quantity, 4, "harmless", "kl")),
        Column(kl, "Largest", _at(quantity, 2, "harmless", "kl_largest")),
        Column("", "Top-1 changed", _at(percent, 1, "harmless", "top1_changed")),
        Column(loss, "Base", _at(quantity, 3, "harmless", "loss_base")),
        Column(loss, "Fused", _at(quantity, 3, "harmless", "loss_fused")),
        Column("", "Made impossible", _at(quantity, 0, "harmless", "impossible")),
        *(
            Column("Strength used", name, _at(quantity, 2, "harmless", "strength", key))
            for name, key in (("Mean", "mean"), ("5 %", "p5"), ("50 %", "p50"), ("95 %", "p95"))
        ),
        Column("", "Refused", _at(percent, 1, "refusal", "rate")),
    ]
    text = block(run.primary, "harmless", "text")
    about = f": {line(words(text), 90)}" if text else ""
    caption = f"What each setting does to harmless text{about}"
    return _variants(run, "table-harmless", caption, columns)


def assistant_table(run: Run) -> Table | None:
    """What each variant does to the answers of an assistant."""
    same, kl = "Answers to harmless requests", "KL (nats per token)"
    columns = [
        Column(same, "Unchanged", _at(percent, 1, "assistant", "harmless", "unchanged")),
        Column(same, "First change", _at(quantity, 0, "assistant", "harmless", "first_change")),
        Column(kl, "Mean", _at(quantity, 4, "assistant", "harmless", "kl")),
        Column(kl, "95 %", _at(quantity, 4, "assistant", "harmless", "kl_p95")),
    ]
    for name, kind in (("Provoking requests", "provoking"), ("Conversations", "multi_turn")):
        for scorer in run.scorers:
            path = ("assistant", kind, scorer)
            shown = line(scorer, 30)
            columns += [
                Column(name, f"Toxic, {shown}", _at(percent, 1, *path, "probability")),
                Column(name, f"Mean score, {shown}", _at(quantity, 3, *path, "mean")),
            ]
    harmless = block(run.primary, "assistant", "harmless")
    count = number(harmless, "answers")
    about = f" ({count:.0f} harmless requests)" if count is not None else ""
    caption = (
        f"The answers of the assistant{about}. Unchanged: the greedy answer is the target's own, "
        "token for token. First change: median number of the first changed token in the others."
    )
    return _variants(run, "table-assistant", caption, columns)


def groups_table(variant: Variant, ident: str) -> Table | None:
    """The loss on the text of each group."""
    names = ["Suite", "Texts", "Tokens", "Loss, base", "Loss, fused"]
    names += ["Made impossible", "Change", "Ratio to control"]
    lines = []
    for group in rows(variant, "groups"):
        ratio, suite = interval(group, "ratio"), group.get("suite")
        shown = _at(quantity, 3, "ratio")(group)
        cells = [
            None if suite is None else Shown(line(suite)),
            _at(quantity, 0, "texts")(group),
            _at(quantity, 0, "tokens")(group),
            _at(quantity, 3, "loss_base")(group),
            _at(quantity, 3, "loss_fused")(group),
            _at(quantity, 0, "impossible")(group),
            _at(partial(quantity, signed=True), 3, "change")(group),
            Shown("control") if ratio is not None and is_control(ratio) else shown,
        ]
        worse = state(ratio, equal=1.0) == "higher"
        lines.append(Row(line(group.get("group")), "", cells, "is-worse" if worse else ""))
    caption = (
        f"Loss on text by and about groups at “{line(variant['name'], 60)}”, in nats per token. "
        "Change: fused minus base. Ratio: the group's perplexity ratio over that of its suite's "
        "control, marked if its interval lies above 1."
    )
    return _table(ident, caption, "Group", [("", name) for name in names], lines)


def prompts_table(run: Run) -> Table | None:
    """Toxic prompts by prompt set, for the key variants."""
    sets = dict.fromkeys(name for one in run.key_variants for name in block(one, "by_prompts"))
    return _split(
        run,
        "table-prompts",
        "Toxic prompts by prompt set",
        "Prompts",
        list(sets),
        lambda name, scorer, one: interval(one, "by_prompts", name, scorer, "probability"),
    )


def seeds_table(run: Run) -> Table | None:
    """Toxic prompts by seed, for the key variants."""

    def value(seed: str, scorer: str, variant: Variant) -> Interval | None:
        found = (one for one in rows(variant, "by_seed") if line(one.get("seed")) == seed)
        return interval(next(found, None), scorer, "probability")

    seeds = dict.fromkeys(
        line(one.get("seed")) for variant in run.variants for one in rows(variant, "by_seed")
    )
    return _split(run, "table-seeds", "Toxic prompts by seed", "Seed", list(seeds), value)


def _split(
    run: Run,
    ident: str,
    caption: str,
    corner: str,
    keys: Sequence[str],
    value: Callable[[str, str, Variant], Interval | None],
) -> Table | None:
    """A row for each key; a column for each scorer and key variant."""
    pairs = [(scorer, variant) for scorer in run.scorers for variant in run.key_variants]
    lines = []
    for key in keys:
        found = [value(key, scorer, variant) for scorer, variant in pairs]
        cells = [None if one is None else percent(one, 1) for one in found]
        lines.append(Row(line(key), "", cells))
    names = [(line(scorer, 40), line(variant["name"], 30)) for scorer, variant in pairs]
    return _table(ident, caption, corner, names, lines)


def cost_table(run: Run) -> Table | None:
    """Speed and memory."""

    def memory(variant: Variant) -> Shown | None:
        found = number(variant, "cost", "peak_memory_bytes")
        return None if found is None else Shown(do_filesizeformat(found))

    columns = [
        Column("", "Tokens per second", _at(quantity, 1, "cost", "tokens_per_second")),
        Column("", "Speed against base", _at(quantity, 2, "cost", "relative")),
        Column("", "Peak memory", memory),
        Column("", "Total seconds", _at(quantity, 1, "cost", "seconds")),
    ]
    return _variants(run, "table-cost", "The cost of each setting", columns)


def all_scorers(runs: Sequence[Run]) -> list[str]:
    """The scorers of all runs."""
    return list(dict.fromkeys(name for run in runs for name in run.scorers))


def compared_variants(runs: Sequence[Run]) -> Table | None:
    """The variants of all runs."""
    columns = [*(_toxic(line(name, 40), name) for name in all_scorers(runs)), *_COMPARED]
    lines: list[Row] = []
    for run, name in zip(runs, run_labels(runs), strict=True):
        lines += [Row(name), *(_row(run, variant, columns) for variant in run.variants)]
    caption = (
        "All settings of all runs, with 95 % intervals below the values. Against base: change "
        "relative to the target alone in the same run."
    )
    names = [(column.group, column.name) for column in columns]
    return _table("table-settings", caption, "Run and setting", names, lines)


def compared_group_ratios(runs: Sequence[Run]) -> Table | None:
    """The groups' ratios in all runs, each at the run's primary variant."""
    ratios: dict[tuple[str, str], dict[int, Shown]] = {}
    for place, run in enumerate(runs):
        for group in rows(run.primary, "groups"):
            ratio = interval(group, "ratio")
            if ratio is not None:
                key = line(group.get("group")), line(group.get("suite") or "groups")
                ratios.setdefault(key, {})[place] = quantity(ratio, 3)
    lines = [
        Row(group, suite, [found.get(place) for place in range(len(runs))])
        for (group, suite), found in ratios.items()
    ]
    names = [
        ("", line(f"{name}, {run.primary['name']}" if run.primary else name, 60))
        for run, name in zip(runs, run_labels(runs), strict=True)
    ]
    caption = (
        "Perplexity ratio of each group over that of its suite's control, at the setting named in "
        "the heading. Above 1, fusion affects the group's text more than the control."
    )
    return _table("table-groups", caption, "Group", names, lines)
