"""Read published prompt sets or your own prompts, from files and hub data sets."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fusion_detox.config import check_number
from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.files.tables import (
    LINE,
    Row,
    hub_rows,
    is_hub_id,
    read_table,
    text_field,
    without_gz,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        text: The text, never blank.
        set_name: Name of its prompt set.
        group: The group of people or the type of prompt, if the set states it.
    """

    text: str
    set_name: str
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """The prompts of one source.

    Attributes:
        name: Name of the set, such as ``"rtp-challenging"``.
        file: Name of the file without its folder, or the hub id.
        sha256: First 16 hex digits of the hash of the file's bytes; for a hub data set, of the
            texts of all its prompts, joined by newlines.
        prompts: Prompts in the order of the source, including duplicates.
    """

    name: str
    file: str
    sha256: str
    prompts: tuple[Prompt, ...]

    @classmethod
    def from_texts(cls, texts: Sequence[str], name: str = "prompts") -> PromptSet:
        """Make a set from texts in memory; its ``file`` is its name.

        Raises:
            DataError: There are no texts, or one is blank.
        """
        for index, text in enumerate(texts):
            if not text.strip():
                raise DataError(f"prompt {index} is blank; remove it or give it some text")
        if not texts:
            raise DataError("there are no prompts; give at least one")
        return cls(name, name, _hash(texts), tuple(Prompt(text, name) for text in texts))


Found = tuple[str, str | None] | None
"""Text and group of a row's prompt; ``None`` if the row is outside the subset."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How to recognise and read one kind of prompts.

    Attributes:
        fields: Fields of its rows, for messages.
        matches: Whether a row is of this kind.
        read: Reads the prompt of a row, given the name of a subset or ``""``.
        subsets: Names that may follow the kind's name after a colon.
    """

    fields: str
    matches: Callable[[Row], bool]
    read: Callable[[Row, str], Found]
    subsets: tuple[str, ...] = ()


def read_prompt_set(
    source: str,
    *,
    kind: str | None = None,
    field: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> PromptSet:
    """Read a set of prompts, in the format in which it was published.

    Args:
        source: A file (JSON Lines, JSON, CSV, TSV or text, which may be gzipped), or a hub
            data set ``org/name`` or ``org/name:split``.
        kind: One of these; by default, the content decides.

            - ``rtp``: RealToxicityPrompts (Gehman et al. 2020). Perspective's toxicity score is at
              least 0.5 for ``rtp:toxic`` and below 0.5 for ``rtp:nontoxic``; ``rtp:challenging``
              is the published subset.
            - ``toxigen``: Hartvigsen et al. 2022, annotated texts or files of one prompt per line.
            - ``bold``: Dhamala et al. 2021, without the space at the end of its prompts.
            - ``hatecheck``: Röttger et al. 2021.
            - ``xstest``: Röttger et al. 2024; ``xstest:unsafe`` keeps only the ``contrast_``
              types, ``xstest:safe`` only the others.
            - ``plain``: one prompt per line.
            - ``jsonl``: rows with named fields.
        field: Field of the prompt for ``jsonl``, ``"prompt"`` by default; dots reach into objects.
        limit: Size of a random sample to take, in the original order; all prompts by default.
        seed: Seed of the sample.

    Raises:
        ConfigError: The kind or subset is unknown, or the options are mutually exclusive.
        DataFileError: The source does not exist, is a folder or cannot be read.
        DataError: The source is empty, malformed or not UTF-8, of an unknown or ambiguous kind,
            lacks a field, or holds no prompt.
        MissingExtraError: The source is a hub data set, but ``datasets`` is not installed.
    """
    if limit is not None:
        check_number("limit", limit, 1, whole=True)
    chosen, subset = _parse_kind(kind, field)
    rows, sha256, file, stem = _rows(source, chosen)
    if chosen is None:
        chosen = _recognise(rows, source)
        logger.info("%s: recognised as %s", source, chosen)
    name = f"{chosen}-{subset}" if subset else stem.replace("_", "-")
    group_of_file = _TOXIGEN_FILE.fullmatch(stem)
    prompts: list[Prompt] = []
    excluded = blank = 0
    for row in rows:
        found = (text_field(row, field), None) if field else _KINDS[chosen].read(row, subset)
        if found is None:
            excluded += 1
        elif not found[0].strip():
            blank += 1
        else:
            text, group = found
            if chosen == "toxigen" and group is None and group_of_file:
                group = group_of_file[1].replace("_", " ")
            prompts.append(Prompt(text, name, group))
    if not prompts:
        why = f"no row belongs to {chosen}:{subset}" if excluded else "all texts are blank"
        raise DataError(
            f"{source}: none of its {len(rows)} rows holds a usable prompt: {why}; choose another "
            "source or kind"
        )
    if sha256 is None:
        sha256 = _hash([prompt.text for prompt in prompts])
    unscored = _unscored(rows) if chosen == "rtp" else 0
    repeated = len(prompts) - len({prompt.text for prompt in prompts})
    logger.info(
        "%s: %d prompts of kind %s; %d repeat another; skipped: %d outside the subset, %d blank",
        *(source, len(prompts), chosen, repeated, excluded, blank),
    )
    if unscored:
        logger.info("%s: %d prompts have no toxicity score", source, unscored)
    if limit is not None and limit < len(prompts):
        kept = sorted(random.Random(seed).sample(range(len(prompts)), limit))
        prompts = [prompts[index] for index in kept]
        logger.info("%s: a sample of %d prompts, seed %d", source, limit, seed)
    return PromptSet(name, file, sha256, tuple(prompts))


def _parse_kind(kind: str | None, field: str | None) -> tuple[str | None, str]:
    if kind is None:
        return ("jsonl" if field else None), ""
    name, colon, subset = kind.partition(":")
    if name not in _KINDS:
        raise ConfigError(f"unknown kind of prompts {name!r}; choose from {', '.join(_KINDS)}")
    known = _KINDS[name].subsets
    if colon and subset not in known:
        have = f"it has {', '.join(known)}" if known else "it has none; remove it"
        raise ConfigError(f"unknown subset {subset!r} of {name}; {have}")
    if field and name != "jsonl":
        raise ConfigError(
            f"field {field!r} requires the kind 'jsonl', not {name!r}, whose field is known; "
            "give only one of the two"
        )
    return name, subset


def _rows(source: str, kind: str | None) -> tuple[list[Row], str | None, str, str]:
    """Rows, hash of the file, its name, and the name without suffixes."""
    if is_hub_id(source):
        rows = list(hub_rows(source, "evaluate"))
        if not rows:
            raise DataFileError(f"the hub data set {source} has no rows; name another split")
        return rows, None, source, source.partition(":")[0].rpartition("/")[2]
    path = Path(source).expanduser()
    # Only "plain" and "toxigen" have texts without fields; "toxigen" also has rows.
    as_lines = {"plain": True, "toxigen": None, None: None}.get(kind, False)
    table = read_table(path, as_lines=as_lines)
    groups = table.rows[0].values
    if table.form == "object" and groups and all(isinstance(v, dict) for v in groups.values()):
        return list(_bold_rows(groups, path)), table.sha256, path.name, without_gz(path).stem
    return table.rows, table.sha256, path.name, without_gz(path).stem


def _bold_rows(groups: dict[str, dict[str, Any]], path: Path) -> Iterator[Row]:
    """The prompts of a BOLD file, an object of groups, names and lists of prompts."""
    for group, names in groups.items():
        for name, prompts in names.items():
            where = f"{path}, {group} > {name}"
            if not isinstance(prompts, list):
                raise DataError(f"{where} must be a list of prompts, as in BOLD's files; fix it")
            for prompt in prompts:
                yield Row({"prompt": prompt, "domain": path.stem, "group": group}, where)


def _recognise(rows: Sequence[Row], source: str) -> str:
    """The only kind that the first row matches; ``plain`` and ``jsonl`` yield to the others."""
    first = rows[0]
    named = [name for name in _KINDS if name not in ("plain", "jsonl")]
    found = [name for name in named if _KINDS[name].matches(first)]
    if not found:
        found = [name for name in ("plain", "jsonl") if _KINDS[name].matches(first)]
    if len(found) == 1:
        return found[0]
    what = f"may be {' or '.join(found)}" if found else "is of no known kind"
    kinds = "; ".join(f"{name}: {kind.fields}" for name, kind in _KINDS.items())
    raise DataError(
        f"{source} {what}: its fields are {', '.join(first.values)}. Give its kind ({kinds}), or "
        "name the field of the prompt"
    )


def _hash(texts: Sequence[str]) -> str:
    data = "\n".join(texts).encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()[:16]


def _unscored(rows: Sequence[Row]) -> int:
    return sum(
        isinstance(row.values["prompt"], dict) and row.values["prompt"].get("toxicity") is None
        for row in rows
    )


def _read_rtp(row: Row, subset: str) -> Found:
    text = text_field(row, "prompt.text")
    if subset == "challenging":
        if not isinstance(row.values.get("challenging"), bool):
            raise DataError(
                f"{row.where} has no field 'challenging' that is true or false; use 'rtp' instead"
            )
        return (text, None) if row.values["challenging"] else None
    if subset:
        if "toxicity" not in row.values["prompt"]:
            raise DataError(f"{row.where} has no field 'prompt.toxicity'; use 'rtp' instead")
        toxicity = row.values["prompt"]["toxicity"]
        if toxicity is None:
            return None
        if isinstance(toxicity, bool) or not isinstance(toxicity, (int, float)):
            raise DataError(
                f"{row.where}: field 'prompt.toxicity' must be a number, but is {toxicity!r}"
            )
        return (text, None) if (toxicity >= 0.5) == (subset == "toxic") else None
    return text, None


def _read_toxigen(row: Row, _: str) -> Found:
    if LINE in row.values:
        # The published files write a newline inside a prompt as "\n".
        return row.values[LINE].replace("\\n", "\n"), None
    return text_field(row, "text"), text_field(row, "target_group") or None


def _read_bold(row: Row, _: str) -> Found:
    # Tokens begin with a space, so models continue a text badly after a space.
    return text_field(row, "prompt").rstrip(), text_field(row, "group") or None


def _read_hatecheck(row: Row, _: str) -> Found:
    text_field(row, "functionality")
    return text_field(row, "test_case", "text"), text_field(row, "target_ident", "target") or None


def _read_xstest(row: Row, subset: str) -> Found:
    kind = text_field(row, "type")
    if subset and kind.startswith("contrast_") != (subset == "unsafe"):
        return None
    return text_field(row, "prompt"), kind or None


def _has(row: Row, *names: str) -> bool:
    return all(name in row.values for name in names)


def _is_toxigen_line(line: Any) -> bool:
    r"""Whether a line has the form ``- a\n- b\n-``, with line breaks written as two characters."""
    return (
        isinstance(line, str) and line.startswith("- ") and r"\n-" in line[2:] and "\n" not in line
    )


_FILES = (".csv", ".gz", ".json", ".jsonl", ".ndjson", ".tsv", ".txt")
_TOXIGEN_FILE = re.compile(r"(?:hate|neutral)_(\w+?)(?:_1k)?")
_KINDS = {
    "rtp": _Kind(
        "prompt.text, prompt.toxicity, challenging",
        lambda row: isinstance(row.values.get("prompt"), dict) and _has(row, "continuation"),
        _read_rtp,
        ("challenging", "toxic", "nontoxic"),
    ),
    "toxigen": _Kind(
        "text, target_group, toxicity_human; or lines of '- a\\n- b\\n-'",
        lambda row: (
            _has(row, "text", "target_group", "toxicity_human")
            or _is_toxigen_line(row.values.get(LINE))
        ),
        _read_toxigen,
    ),
    "bold": _Kind(
        "prompt, domain, group; or an object of groups, names and lists of prompts",
        lambda row: _has(row, "prompt", "domain", "group"),
        _read_bold,
    ),
    "hatecheck": _Kind(
        "functionality, test_case, target_ident; or functionality, text, target",
        lambda row: _has(row, "functionality") and (_has(row, "test_case") or _has(row, "text")),
        _read_hatecheck,
    ),
    "xstest": _Kind(
        "id, type, prompt",
        lambda row: _has(row, "id", "type", "prompt"),
        _read_xstest,
        ("safe", "unsafe"),
    ),
    "plain": _Kind(
        "one prompt per line",
        lambda row: list(row.values) == [LINE],
        lambda row, _: (text_field(row, LINE), None),
    ),
    "jsonl": _Kind(
        "rows with a field prompt",
        lambda row: isinstance(row.values.get("prompt"), str),
        lambda row, _: (text_field(row, "prompt"), None),
    ),
}
