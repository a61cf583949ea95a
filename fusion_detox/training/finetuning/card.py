"""The model card of an adapter, made from its training record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from fusion_detox.calibrator.card import yaml_text

_TEMPLATE = Path(__file__).resolve().with_name("card.md")


def render_adapter_card(record: Mapping[str, Any]) -> str:
    """The text of ``README.md``.

    Args:
        record: The training record, as ``finetune`` writes it.
    """
    base, name = str(record["base_model"]), str(record["name"])
    measured, before = record["held_out"]["after"], record["held_out"]["before"]
    facts = {
        "objective": record["objective"],
        "target modules": record["target_modules"],
        "base weights": record["dtype"],
        "seed": record["seed"],
        **{key.replace("_", " "): value for key, value in record["data_counts"].items()},
        **{
            f"file of {role}": [item["name"] for item in files]
            for role, files in record["data_files"].items()
        },
        **{key: record[key] for key in ("language", "license") if record.get(key)},
        "seconds": record["seconds"],
    }
    rows = [(key, before.get(key), value) for key, value in measured.items()]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", record["command"])), default=0))
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        front_matter=_front_matter(base, record),
        title=_inline(name),
        base=_inline(base),
        base_literal=json.dumps(base, ensure_ascii=False),
        name_literal=json.dumps(name, ensure_ascii=False),
        objective=record["objective"],
        measured=_table(("", "base", "with the adapter"), rows)
        if rows
        else "Nothing was held out.",
        command=f"{fence}console\n{record['command']}\n{fence}",
        facts=_table(("", ""), facts.items()),
        settings=_value(record["settings"]),
        contrast=_value(record["contrast"]),
        versions=_value(record["versions"]),
    )


def _front_matter(base: str, record: Mapping[str, Any]) -> str:
    on_hub = not base.startswith(("/", ".")) and base.count("/") <= 1 and "\\" not in base
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation"]
    if on_hub:
        lines.append(f"base_model: {yaml_text(base)}")
    lines += [
        f"{key}: {yaml_text(record[key])}"
        for key in ("language", "license")
        if isinstance(record.get(key), str)
    ]
    return "\n".join([*lines, "tags:", "- lora", "- fusion-detox", "- detoxification", "---"])


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = list(header)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(_inline(_value(cell)) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _inline(value: Any) -> str:
    """On one line, without what would end the surrounding markup."""
    return " ".join(str(value).split()).replace("<", "&lt;").replace("|", "\\|")
