"""The model card of an adapter, made from its training record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_detox.files.cards import front_matter, render_card

_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def render_adapter_card(record: Mapping[str, Any]) -> str:
    """The text of ``README.md``.

    Args:
        record: The training record, as ``finetune`` writes it.
    """
    base = str(record["base_model"])
    before, after = record["held_out"]["before"], record["held_out"]["after"]
    described = {key: record[key] for key in ("language", "license") if record.get(key)}
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
        **described,
        "seconds": record["seconds"],
    }
    metadata: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if not base.startswith(("/", ".")) and base.count("/") <= 1 and "\\" not in base:
        metadata["base_model"] = base
    metadata |= {key: value for key, value in described.items() if isinstance(value, str)}
    metadata["tags"] = ["lora", "fusion-detox", "detoxification"]
    return render_card(
        _TEMPLATE,
        front_matter=front_matter(metadata),
        name=str(record["name"]),
        base=base,
        objective=record["objective"],
        measured=[(key, before.get(key), value) for key, value in after.items()],
        command=record["command"],
        facts=facts,
        settings=record["settings"],
        contrast=record["contrast"],
        versions=record["versions"],
    )
