"""The model card of an adapter, made from its training record."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_detox.files.cards import Markdown, front_matter, render_card

_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def render_adapter_card(record: Mapping[str, Any]) -> str:
    """The text of ``README.md``.

    Args:
        record: The training record, as ``finetune`` writes it.
    """
    base = str(record["base_model"])
    held_out = record["held_out"]
    before, after, sizes = held_out["before"], held_out["after"], held_out["on"]
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
        shell_name=Markdown(shlex.quote(str(record["name"]))),
        measured=[(key, before.get(key), value) for key, value in after.items()],
        measured_on=_measured_on(record, sizes),
        wordings=bool(sizes["anchors"]),
        general=bool(sizes["general_blocks"]),
        command=record["command"],
        facts=facts,
        settings=record["settings"],
        contrast=record["contrast"],
        versions=record["versions"],
    )


def _measured_on(record: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """The held-out text, with its size and the files it comes from."""
    files = {
        role: ", ".join(str(item["name"]) for item in found)
        for role, found in record["data_files"].items()
    }
    parts = []
    if sizes["anchors"]:
        parts.append(
            f"{sizes['anchors']} anchors of {files['pairs']} ({sizes['positives']} non-toxic and "
            f"{sizes['negatives']} toxic wordings)"
        )
    if sizes["general_blocks"]:
        parts.append(
            f"{sizes['general_blocks']} blocks of at most {record['settings']['context_length']} "
            f"tokens of {files['general']}"
        )
    return " and ".join(parts)
