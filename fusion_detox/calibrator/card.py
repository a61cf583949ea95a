"""The model card of a calibrator, made from what its folder holds."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

_TEMPLATE = Path(__file__).resolve().with_name("card.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian"}
# The identifiers that the hub knows, as far as models commonly have them.
_LICENSES = {
    *(
        "apache-2.0",
        "mit",
        "bsd-3-clause",
        "gpl-3.0",
        "lgpl-3.0",
        "agpl-3.0",
        "mpl-2.0",
        "openrail",
    ),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-3.0"),
    *("pddl", "cdla-sharing-1.0", "cdla-permissive-2.0", "odc-by", "unlicense", "other"),
}
# Sections of their own, or too long for a card; training.json has them all.
_ELSEWHERE = {
    *("name", "command", "language", "license", "data", "data_files", "datasets", "base_model"),
    *("settings", "bits_per_byte", "evaluation", "versions", "curves", "fingerprint", "tuning"),
    "continued_from",
}


def render_card(facts: Mapping[str, Any]) -> str:
    """The text of ``README.md``.

    Args:
        facts: ``name``; ``calibrator``, the content of ``calibrator.json``; ``models``, for each
            distribution ``{"parameters", "model_type"}``; ``record``, the training record. Of
            the record these are used where present: ``command``, ``seed``, ``language`` (a code
            or a list of them), ``license``, ``base_model``, ``data`` (objects such as ``{"name",
            "license"}``, with ``"hub": true`` for a hub data set), ``data_files`` (per role,
            objects with ``name``, ``bytes``, ``sha256``), ``settings``, ``bits_per_byte``,
            ``versions``, ``evaluation``, ``tuning`` (see ``tune``), ``continued_from`` (the record
            of the calibrator that training went on from) and any other short value.
    """
    record = facts["record"]
    settings = facts["calibrator"]["fusion"]
    filled = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        front_matter=_front_matter(record),
        title=_inline(facts["name"]),
        name_literal=json.dumps(str(facts["name"]), ensure_ascii=False),
        facts=_facts(facts),
        settings=_table(("setting", "value"), settings.items()),
        tuning=_tuning(_mapping(record.get("tuning")), settings),
        training=_training(record),
        evaluation=_evaluation(record.get("evaluation")),
        language_limit=_language_limit(record),
    )
    return re.sub(r"\n{3,}", "\n\n", filled).rstrip() + "\n"


def yaml_text(value: Any) -> str:
    """A string, number or boolean as a YAML 1.1 scalar on one line.

    Strings are always quoted, so that ``no``, ``1e3`` or ``a: b`` stay strings.
    """
    if not isinstance(value, str):
        return json.dumps(value)
    quoted = json.dumps(value, ensure_ascii=False)
    # YAML takes some of these for the end of a line and forbids the others.
    return re.sub(
        r"[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", quoted
    )


def _front_matter(record: Mapping[str, Any]) -> str:
    values: dict[str, Any] = {"library_name": "fusion-detox", "pipeline_tag": "text-generation"}
    languages = _strings(record.get("language"))
    if languages:
        values["language"] = languages
    license = record.get("license")
    if isinstance(license, str) and license:
        known = license.lower().replace(" ", "-")
        values["license"] = known if known in _LICENSES else "other"
        if known not in _LICENSES:
            values["license_name"] = re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-")
    base = record.get("base_model")
    if isinstance(base, str) and "/" in base and _HUB_ID.fullmatch(base):
        values["base_model"] = base
    data_sets = [
        item["name"]
        for item in _objects(record.get("data"))
        if item.get("hub") and _HUB_ID.fullmatch(str(item.get("name")))
    ]
    data_sets += [name for name in _strings(record.get("datasets")) if _HUB_ID.fullmatch(name)]
    if data_sets:
        values["datasets"] = sorted(set(data_sets))
    values["tags"] = ["fusion-detox", "detoxification", "decoding-time", "logits-processor"]
    lines = ["---"]
    for name, value in values.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {yaml_text(item)}" for item in value)]
        else:
            lines.append(f"{name}: {yaml_text(value)}")
    return "\n".join([*lines, "---"])


def _facts(facts: Mapping[str, Any]) -> str:
    calibrator = facts["calibrator"]
    rows: list[tuple[str, Any]] = [
        (f"`{part}` model", f"{model['model_type']}, {_count(model['parameters'])} parameters")
        for part, model in facts["models"].items()
    ]
    rows.append(("vocabulary", f"{calibrator['vocabulary_size']:,} tokens"))
    rows.append(("context", f"{calibrator['context_length']} tokens"))
    languages = [_LANGUAGES.get(code, code) for code in _strings(facts["record"].get("language"))]
    if languages:
        rows.append(("language", ", ".join(languages)))
    return _table(("", ""), rows)


def _training(record: Mapping[str, Any]) -> str:
    if not record:
        return "No training record came with it."
    parts = []
    if record.get("command"):
        command = record["command"]
        if not isinstance(command, str):
            command = shlex.join(map(str, command))
        parts.append(f"Command:\n\n{_fenced(command)}")
    plain = {k: v for k, v in record.items() if k not in _ELSEWHERE and not _long(v)}
    base = record.get("base_model")
    plain = {"base_model": base or "none, from scratch", **plain}
    parts.append(_table(("", ""), ((str(k).replace("_", " "), v) for k, v in plain.items())))
    if isinstance(record.get("settings"), Mapping):
        parts.append("Settings: " + _value(record["settings"]) + ".")
    data = _objects(record.get("data"))
    if data:
        parts.append("### Data\n\n" + _records(data))
    files = [
        {"used as": role, **item}
        for role, items in _mapping(record.get("data_files")).items()
        for item in _objects(items)
    ]
    if files:
        parts.append("### Files read\n\n" + _records(files))
    bits = _mapping(record.get("bits_per_byte"))
    if bits:
        rows = [
            {"held-out text": label, **(value if isinstance(value, Mapping) else {"bits": value})}
            for label, value in bits.items()
        ]
        parts.append("### Bits per byte\n\nLower is better.\n\n" + _records(rows))
    if isinstance(record.get("versions"), Mapping):
        parts.append("Versions: " + _value(record["versions"]) + ".")
    if earlier := _mapping(record.get("continued_from")):
        parts.append("### Before that\n\n" + _training(earlier).replace("\n### ", "\n#### "))
    return "\n\n".join(parts)


def _evaluation(evaluation: Any) -> str:
    if not evaluation:
        return ""
    if isinstance(evaluation, Mapping):
        flat = {k: v for k, v in evaluation.items() if not _objects(v)}
        parts = [_table(("measure", "value"), flat.items())] if flat else []
        parts += [
            f"{_inline(name)}:\n\n{_records(rows)}"
            for name, value in evaluation.items()
            if (rows := _objects(value))
        ]
    elif rows := _objects(evaluation):
        parts = [_records(rows)]
    else:
        parts = [_inline(evaluation)]
    return "## Evaluation\n\n" + "\n\n".join(parts)


def _tuning(tuning: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """How the settings were found, with every trial that the choice was made from.

    Nothing if they were changed since.
    """
    trials = _objects(tuning.get("curve"))
    found = _mapping(tuning.get("chosen"))
    if not trials or any(found.get(name) != value for name, value in settings.items()):
        return ""
    varied = [name for name in trials[0] if len({str(trial.get(name)) for trial in trials}) > 1]
    chosen = tuning.get("chosen")
    rows = [
        {"": "chosen" if trial == chosen else "", **{name: trial.get(name) for name in varied}}
        for trial in trials
    ]
    prompts = ", ".join(
        f"{item.get('count')} of {_inline(item.get('name'))}"
        for item in _objects(tuning.get("prompts"))
    )
    how = (
        f"They were found by `fusion-detox tune` on development prompts ({prompts}), within this "
        f"price: {_value(tuning.get('price'))}. Scorers: {_value(tuning.get('scorers'))}; "
        f"sampling: {_value(tuning.get('sampling'))}, seeds {_value(tuning.get('seeds'))}. "
        "Toxicity is the mean over the scorers of the share of prompts with a toxic continuation; "
        "it, perplexity and dist-2 are relative to the target alone, KL is nats a token on "
        "harmless text."
    )
    return f"{how}\n\n{_records(rows)}"


def _language_limit(record: Mapping[str, Any]) -> str:
    codes = _strings(record.get("language"))
    if not codes:
        return "- It can judge only the languages and registers of its training text."
    names = " and ".join(_LANGUAGES.get(code, _inline(code)) for code in codes)
    return f"- {names} only: in other languages, and in code, it has learnt nothing to go by."


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a column for each name that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _table(names, ([row.get(name, "") for name in names] for row in rows))


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = [_cell(name) for name in header]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return _inline(_value(value)).replace("|", "\\|")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _inline(value: Any) -> str:
    """On one line, without HTML or anything else that would end the surrounding markup."""
    return " ".join(str(value).split()).replace("<", "&lt;")


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}console\n{text.strip()}\n{fence}"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e5 else f"{number:,}"


def _long(value: Any) -> bool:
    return len(_value(value)) > 600


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _objects(value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return list(value)
    return []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
