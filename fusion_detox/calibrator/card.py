"""The model card of a calibrator, made from the contents of its folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusion_detox.files import cards
from fusion_detox.files.cards import plain_text, records_table, table

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian"}
# The license identifiers of the hub that models commonly use.
_LICENSES = {
    *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-3.0"),
    *(
        "cdla-sharing-1.0",
        "cdla-permissive-2.0",
        "odc-by",
        "openrail",
        "pddl",
        "unlicense",
        "other",
    ),
}
# These have sections of their own or are too long for a card; training.json has all of them.
_NOT_IN_FACTS = {
    *("name", "command", "language", "license", "data", "data_files", "datasets", "base_model"),
    *("settings", "bits_per_byte", "evaluation", "versions", "curves", "fingerprint", "tuning"),
    "continued_from",
}
_MAX_FACT_LENGTH = 600


def render_card(
    name: str,
    calibrator: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    record: Mapping[str, Any],
) -> str:
    """The text of ``README.md``.

    Args:
        name: The calibrator's name.
        calibrator: The content of ``calibrator.json``.
        models: For each distribution, ``{"parameters": …, "model_type": …}``.
        record: The training record. The card uses these entries if they are present: ``command``,
            ``seed``, ``language`` (a code or a list of codes), ``license``, ``base_model``,
            ``data`` (objects such as ``{"name", "license"}``, with ``"hub": true`` for a hub data
            set), ``data_files`` (per role, objects with ``name``, ``bytes``, ``sha256``),
            ``settings``, ``bits_per_byte``, ``versions``, ``evaluation``, ``tuning`` (see
            ``tune``), ``continued_from`` (the record of the calibrator that training started from)
            and any other short value.
    """
    languages = [_LANGUAGES.get(code, code) for code in _strings(record.get("language"))]
    facts: list[tuple[str, Any]] = [
        (f"`{part}` model", f"{model['model_type']}, {_count(model['parameters'])} parameters")
        for part, model in models.items()
    ]
    facts.append(("vocabulary", f"{calibrator['vocabulary_size']:,} tokens"))
    facts.append(("context", f"{calibrator['context_length']} tokens"))
    if calibrator.get("words"):
        facts.append(("words held back in any text", len(calibrator["words"])))
    if languages:
        facts.append(("language", languages))
    return cards.render_card(
        _TEMPLATE,
        front_matter=cards.front_matter(_metadata(record)),
        name=name,
        facts=facts,
        settings=calibrator["fusion"],
        tuning=_tuning(_mapping(record.get("tuning")), calibrator["fusion"]),
        stages=list(_stages(record)),
        evaluation=_evaluation(record.get("evaluation")),
        languages=languages,
    )


def _metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"library_name": "fusion-detox", "pipeline_tag": "text-generation"}
    if languages := _strings(record.get("language")):
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
    data_sets = [str(item.get("name")) for item in _objects(record.get("data")) if item.get("hub")]
    data_sets += _strings(record.get("datasets"))
    if on_hub := {name for name in data_sets if _HUB_ID.fullmatch(name)}:
        values["datasets"] = sorted(on_hub)
    values["tags"] = ["fusion-detox", "detoxification", "decoding-time", "logits-processor"]
    return values


def _stages(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The training runs that produced the calibrator, the last one first."""
    while record:
        command = record.get("command")
        if command and not isinstance(command, str):
            command = shlex.join(map(str, command))
        facts = {"base model": record.get("base_model") or "none, from scratch"}
        for name, value in record.items():
            if name not in _NOT_IN_FACTS and len(plain_text(value)) <= _MAX_FACT_LENGTH:
                facts[str(name).replace("_", " ")] = value
        yield {
            "command": command,
            "facts": facts.items(),
            "settings": _mapping(record.get("settings")),
            "data": _objects(record.get("data")),
            "files": [
                {"used as": role, **item}
                for role, items in _mapping(record.get("data_files")).items()
                for item in _objects(items)
            ],
            "bits": [
                {"held-out text": text, **(bits if isinstance(bits, Mapping) else {"bits": bits})}
                for text, bits in _mapping(record.get("bits_per_byte")).items()
            ],
            "versions": _mapping(record.get("versions")),
        }
        record = _mapping(record.get("continued_from"))


def _evaluation(results: Any) -> list[tuple[str, Any]]:
    """Results, each with a title; the first title may be empty."""
    if not results:
        return []
    if not isinstance(results, Mapping):
        rows = _objects(results)
        return [("", records_table(rows) if rows else results)]
    flat = {name: value for name, value in results.items() if not _objects(value)}
    titled = [("", table(flat.items(), ("measure", "value")))] if flat else []
    return titled + [
        (f"{name}:", records_table(rows))
        for name, value in results.items()
        if (rows := _objects(value))
    ]


def _tuning(tuning: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the settings were chosen, with every trial; ``None`` if they have changed since then."""
    trials, chosen = _objects(tuning.get("curve")), tuning.get("chosen")
    if not trials or any(_mapping(chosen).get(name) != value for name, value in settings.items()):
        return None
    varied = [name for name in trials[0] if len({str(trial.get(name)) for trial in trials}) > 1]
    return {
        **{name: tuning.get(name) for name in ("price", "scorers", "sampling", "seeds", "check")},
        "prompts": [
            f"{item.get('count')} of {item.get('name')}" for item in _objects(tuning.get("prompts"))
        ],
        "trials": [
            {"": "chosen" if trial == chosen else "", **{name: trial.get(name) for name in varied}}
            for trial in trials
        ],
    }


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e5 else f"{number:,}"


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _objects(value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return value
    return []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
