"""What was measured on what, how to repeat it, and what each number means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fusion_detox.evaluation.report.markup import Html, join, line, tag
from fusion_detox.evaluation.report.reading import Run, at, block, is_list, number, rows
from fusion_detox.evaluation.report.tables import Row, table
from fusion_detox.evaluation.report.wording import as_json, digits, label, size, words

_GLOSSARY = {
    "Toxic prompts": (
        "Share of prompts with at least one continuation that the scorer gives the threshold or "
        "more. Called toxicity probability by Gehman et al. (2020). It grows with the number of "
        "continuations a prompt, so it compares only at the same number."
    ),
    "Expected maximum": (
        "Mean over prompts of the highest score among a prompt's continuations (expected "
        "maximum toxicity, Gehman et al. 2020)."
    ),
    "Mean score, toxic continuations": (
        "Mean score of all continuations, and the share of them at or above the threshold."
    ),
    "Interval": (
        "95 % bootstrap interval over prompts: how far the value might move had other prompts "
        "of the same kind been drawn. It holds neither other kinds of prompts nor errors of a "
        "scorer."
    ),
    "Against base, p": (
        "Fused minus base on the same prompts. p is how often a difference at least this large "
        "would come about were there no effect. “May be chance”: the interval holds 0, or p is "
        "0.05 or more. Neither is corrected for the number of settings."
    ),
    "Perplexity": (
        "How surprising the continuations are to the perplexity model, each token counting the "
        "same: exp of the mean negative log-probability. Lower is more fluent; very low can "
        "mean repetition."
    ),
    "dist-n, self-BLEU": (
        "dist-n: distinct n-grams of words over all n-grams (Li et al. 2016), higher is more "
        "varied. Self-BLEU: how alike the continuations of a prompt are (Zhu et al. 2018), lower "
        "is more varied."
    ),
    "Repetition, empty, degenerate": (
        "Shares of continuations that repeat a sequence of words, that hold no text, and that are "
        "no usable text (empty ones among them)."
    ),
    "Similarity": (
        "Cosine between sentence embeddings of the continuation and the prompt, or of the fused "
        "and the base continuation. 1 is the same direction."
    ),
    "KL": (
        "Kullback-Leibler divergence of the fused from the target's next-token distribution on "
        "harmless text, in nats a token. 0: nothing changes."
    ),
    "Top-1 changed": (
        "Share of positions of harmless text where the most probable token is another one."
    ),
    "Ratio to control": (
        "Factor by which fusion raises the perplexity of a group's text, over the factor for "
        "the control text of the same suite. Above 1, the group's text is held back more."
    ),
    "Made impossible": (
        "Tokens of given text to which fusion left no probability at all; with one, the loss is "
        "infinite and not shown."
    ),
    "Refused": (
        "Share of harmless requests that sound unsafe which were answered with a refusal. More "
        "refusals than the target's own are harm."
    ),
    "AUC": (
        "How well a scorer ranks toxic above other text on labelled data: 1 is perfect, 0.5 is "
        "guessing."
    ),
    "Speed": "Generated tokens a second, and as a multiple of the target's own speed.",
}


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values; those without value are left out."""
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", value))
            for name, value in pairs
            if value not in (None, "")
        ),
        class_="facts",
    )


def basics(run: Run) -> Html:
    """Target, calibrators, sampling and the models that judge."""
    results = run.results
    return facts(
        [
            ("Target", _model(block(results, "target"))),
            ("Calibrator", _calibrators(run)),
            ("Continuations", _sampling(run)),
            ("Counts as toxic", f"a score of {run.threshold:g} or more"),
            ("Perplexity model", _model(block(results, "perplexity_model"))),
            ("Run on", line(results["created"]) if results.get("created") else None),
            ("Machine", words(block(results, "machine"))),
        ]
    )


def setup(run: Run) -> Html:
    """What was measured on what."""
    return join([basics(run), _prompts(run), _scorers(run)])


def _model(record: Mapping[str, Any]) -> Html | None:
    if not record:
        return None
    parameters, tokens = size(number(record, "parameters")), size(number(record, "vocabulary"))
    more = [
        None if parameters is None else f"{parameters} parameters",
        None if tokens is None else f"vocabulary of {tokens}",
        line(record["dtype"]) if record.get("dtype") else None,
    ]
    parts = [tag("b", line(record.get("name") or "unnamed")), *filter(None, more)]
    return join([join(parts, ", "), _code(record.get("fingerprint"))])


def _code(value: object) -> Html | None:
    return None if value is None else join([" ", tag("code", line(value))])


def _calibrators(run: Run) -> Html | None:
    found: dict[str, Html] = {}
    for setting in run.settings:
        record = block(setting, "calibrator")
        if record:
            parts = [_model(record)]
            kind, coverage = at(setting, "map", "kind"), number(setting, "map", "coverage")
            if kind is not None:
                share = "" if coverage is None else f", {digits(coverage * 100, 1)} % covered"
                parts.append(join([f" (vocabulary map: {line(kind)}{share})"]))
            found.setdefault(words([record, at(setting, "map")]), join(parts))
    return join(found.values(), "; ") if found else None


def _sampling(run: Run) -> str:
    sampling = block(run.results, "sampling")
    parts = []
    if run.samples is not None:
        parts.append(f"{run.samples} a prompt")
    if (longest := number(sampling, "max_new_tokens")) is not None:
        parts.append(f"up to {digits(longest, 0)} tokens")
    if sampling.get("greedy"):
        parts.append("greedy")
    else:
        for key, words_ in (("temperature", "temperature"), ("top_p", "top-p"), ("top_k", "top-k")):
            value = number(sampling, key)
            if value is not None and not (key == "top_k" and value == 0):
                parts.append(f"{words_} {value:g}")
    known = {"samples", "max_new_tokens", "greedy", "temperature", "top_p", "top_k"}
    parts += [f"{label(key)} {words(value)}" for key, value in sampling.items() if key not in known]
    seeds = run.results.get("seeds")
    if is_list(seeds) and seeds:
        parts.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {words(seeds)}")
    return ", ".join(parts)


def _prompts(run: Run) -> Html | None:
    lines = []
    for item in rows(run.results, "prompts"):
        count = number(item, "count")
        cells = [
            None if count is None else digits(count, 0),
            tag("span", line(item["file"]), class_="name") if item.get("file") else None,
            tag("code", line(item["sha256"])) if item.get("sha256") else None,
        ]
        lines.append(Row(tag("span", line(item.get("name")), class_="name"), cells))
    names = [("", "Prompts"), ("", "File"), ("", "SHA-256")]
    return table("table-prompt-files", "The prompts", "Set", names, lines)


def _scorers(run: Run) -> Html | None:
    lines = []
    for scorer in run.scorers:
        record = block(run.results, "scorers", scorer)
        main = scorer == str(run.results.get("main_scorer"))
        head = join(
            [
                tag("span", line(scorer), class_="name"),
                tag("span", "main scorer", class_="what") if main else None,
            ]
        )
        auc = record.get("auc")
        rest = {  # how it was trained stands in results.json, at length
            key: value
            for key, value in record.items()
            if key not in ("name", "model", "auc", "command")
            and isinstance(value, (str, int, float))
        }
        cells = [
            tag("span", line(record["model"]), class_="prose") if record.get("model") else None,
            None if auc is None else _aucs(auc),
            tag("span", line(words(rest), 500), class_="prose") if rest else None,
        ]
        lines.append(Row(head, cells))
    names = [("", "Model"), ("", "AUC on labelled text"), ("", "More")]
    return table("table-scorers", "The scorers of toxicity", "Scorer", names, lines)


def _aucs(auc: Any) -> Html:
    if not isinstance(auc, Mapping):
        return tag("span", words(auc))
    return tag(
        "ul",
        *(
            tag("li", f"{label(name)} ", tag("b", words(value)))
            for name, value in auc.items()
            if value is not None
        ),
        class_="plain",
    )


def reproduce(run: Run) -> Html:
    """The command, the settings' configurations and the versions."""
    results = run.results
    parts: list[object] = []
    if results.get("command"):
        parts += [tag("h3", "Command"), _pre(results["command"], "Command")]
    configs = {line(s["name"]): s.get("config") for s in run.settings}
    parts += [tag("h3", "Settings"), _pre(as_json(configs), "Settings as JSON")]
    versions = block(results, "versions")
    if versions:
        parts += [
            tag("h3", "Versions"),
            facts((line(name), words(value)) for name, value in versions.items()),
        ]
    return join(parts)


def _pre(text: object, name: str) -> Html:
    return tag("pre", tag("code", text), tabindex="0", role="region", aria_label=name)


def notes(run: Run) -> Html | None:
    """What the run itself says that a reader must know."""
    found = run.results.get("notes")
    lines = [line(note) for note in found if note] if found and is_list(found) else []
    return tag("ul", *(tag("li", note) for note in lines), class_="notes") if lines else None


def glossary() -> Html:
    """How each number is defined."""
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", text)) for name, text in _GLOSSARY.items()),
        class_="glossary",
    )
