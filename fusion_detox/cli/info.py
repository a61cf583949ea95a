"""``fusion-detox info``: describes a calibrator, and how it fits a target's vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_detox.cli.console import quiet_libraries, results, write_json
from fusion_detox.cli.shared_options import CalibratorArgument

if TYPE_CHECKING:
    from fusion_detox.calibrator.calibrator import Calibrator


_MAX_LIST = 12


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("info")(info)


def info(
    calibrator: CalibratorArgument,
    target: Annotated[
        str | None,
        typer.Option(
            help="Model or tokenizer to map the vocabulary to: a folder or a hub id.",
            metavar="MODEL_OR_TOKENIZER",
        ),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Also show how the calibrator was trained.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object that holds everything.")
    ] = False,
) -> None:
    """Show what a calibrator is, and how it fits a target."""
    from fusion_detox.calibrator.calibrator import Calibrator

    with quiet_libraries():
        loaded = Calibrator.from_pretrained(calibrator)
        facts = describe(loaded, calibrator)
        if target is not None:
            facts["map"] = describe_map(loaded, target)
    if as_json:
        write_json(facts)
    else:
        _print_table(facts, training)


def describe(calibrator: Calibrator, name: str) -> dict[str, Any]:
    """Describes a calibrator as JSON-ready values."""
    from fusion_detox.alignment.store import describe_alignments
    from fusion_detox.calibrator.lookup import find_calibrator

    folder = find_calibrator(name)
    return {
        "name": name,
        "folder": str(folder.resolve()),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "distributions": list(calibrator.models),
        "parameters": {kind: parameter_count(model) for kind, model in calibrator.models.items()},
        "vocabulary_size": calibrator.vocabulary_size,
        "tokenizer": calibrator.tokens.kind,
        "context_length": calibrator.context_length,
        "fusion": calibrator.config.to_dict(),
        "training": calibrator.record,
        "alignments": describe_alignments(calibrator),
    }


def describe_map(calibrator: Calibrator, target: str) -> dict[str, Any]:
    """Describes how a calibrator's vocabulary maps to a target's, as JSON-ready values.

    Raises:
        ModelNotFoundError: No tokenizer was found at that path or hub id.
        ModelError: Its files are damaged.
        VocabularyError: The vocabularies cannot be mapped.
    """
    from fusion_detox.files.models import load_tokenizer
    from fusion_detox.vocabulary.map import VocabularyMap
    from fusion_detox.vocabulary.token_table import TokenTable

    tokenizer = load_tokenizer(target)
    tokens = TokenTable.from_tokenizer(tokenizer)
    mapping = VocabularyMap.build(calibrator, tokens, tokenizer)
    return {
        "target": target,
        "tokenizer": tokens.kind,
        "target_size": len(tokens.token_bytes),
        "kind": mapping.kind,
        "coverage": float(mapping.coverage),
        "mapped_tokens": int(mapping.mapped.sum()),
        "build_seconds": float(mapping.build_seconds),
    }


def parameter_count(model: Any) -> int:
    """The number of values in a model's weights."""
    return sum(parameter.numel() for parameter in model.parameters())


def _print_table(facts: dict[str, Any], training: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, title=f"Calibrator {facts['name']}", title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(facts, training):
        table.add_row(name, Text(value))
    results().print(table)


def _lines(facts: dict[str, Any], training: bool) -> list[tuple[str, str]]:
    lines = []
    if found := facts.get("map"):  # what was asked for comes first
        lines += [
            ("target", f"{found['target']}: {found['target_size']:,} tokens, {found['tokenizer']}"),
            ("coverage", f"{found['coverage']:.4%} of probability mass"),
            ("map", f"{found['kind']}, {found['mapped_tokens']:,} target tokens reached"),
            ("build time", f"{found['build_seconds']:.2f} s"),
        ]
    counts = ", ".join(f"{kind} {_millions(n)}" for kind, n in facts["parameters"].items())
    lines += [
        ("folder", facts["folder"]),
        ("size", f"{facts['bytes'] / 1e6:.1f} MB"),
        ("distributions", counts + " parameters"),
        ("vocabulary", f"{facts['vocabulary_size']:,} tokens, {facts['tokenizer']}"),
        ("context", f"{facts['context_length']} tokens"),
        ("recommended", ", ".join(f"{k} {_value(v)}" for k, v in facts["fusion"].items())),
    ]
    lines += [("alignment", _alignment(row)) for row in facts["alignments"]]
    record = _flat(facts["training"])
    if training:
        lines += [(f"training: {name}", text) for name, text in record]
    elif record:
        lines.append(("training", "shown by --training"))
    return lines


def _alignment(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    report = row["report"]
    return (
        f"{report['target']}: {row['config']['embeddings']} embeddings, "
        f"{report['common_tokens']:,} common tokens, retrieval at 1 "
        f"{report['to_target']['at_1']:.1%}, {row['folder']}"
    )


def _flat(record: dict[str, Any]) -> list[tuple[str, str]]:
    """One line per entry of the training record, or per object if an entry is a list of objects."""
    lines = []
    for name, value in record.items():
        if value is None or value in ({}, [], ""):
            continue
        label = str(name).replace("_", " ")
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            lines += [(label, _value(item)) for item in value]
        else:
            lines.append((label, _value(value)))
    return lines


def _value(value: Any) -> str:
    if isinstance(value, dict):
        inner = (
            (name, f"({_value(item)})" if isinstance(item, dict) else _value(item))
            for name, item in value.items()
            if item is not None
        )
        return ", ".join(f"{name} {text}" for name, text in inner)
    if isinstance(value, list):
        long = len(value) > _MAX_LIST
        return f"{len(value)} entries, see --json" if long else "; ".join(map(_value, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
