"""The variants that an evaluation compares: the target alone, fusion, the word filter."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from fusion_detox.config import FusionConfig, Rule
from fusion_detox.errors import ConfigError
from fusion_detox.files.fingerprints import short_name

_FORM = (
    "base, wordfilter, default, or a rule with changes such as contrast:strength=2,threshold=0.3"
)
# The rules as in the literature, without the additions of this library's contrast rule.
_PLAIN = {"plausibility": 0.0, "outside": "keep", "kl_budget": None, "context_kl": None}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a report; users call it a setting.

    Attributes:
        name: As the user wrote it; ``"base"`` is the target alone.
        kind: What runs on top of the target.
        rule: The fusion rule; ``None`` for the one that the calibrator recommends.
        changes: Changes to the settings that the rule starts with.
        config: Complete fusion settings, if the user gave them.
        calibrator: Name, folder or hub id of a calibrator other than the run's.
    """

    name: str
    kind: Literal["base", "fusion", "wordfilter"]
    rule: Rule | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    config: FusionConfig | None = None
    calibrator: str | None = None

    def resolve(self, recommended: FusionConfig) -> FusionConfig:
        """The variant's fusion settings, given those that its calibrator recommends.

        If both have the same rule, the changes apply to the recommended settings. Otherwise,
        ``mixture``, ``product`` and ``aligned`` start from plain settings, in which all tokens are
        candidates.

        Raises:
            ConfigError: A name is unknown or a value is out of range.
        """
        if self.config is not None:
            return self.config
        start = recommended
        if self.rule is not None and self.rule != recommended.rule:
            plain = {} if self.rule in ("contrast", "aligned_contrast") else _PLAIN
            start = FusionConfig(rule=self.rule, strength=0.5, **plain)  # type: ignore[arg-type]
        try:
            return start.replace(**dict(self.changes))
        except ConfigError as error:
            raise ConfigError(f"setting {self.name!r}: {error}") from error


BASE = Variant("base", "base")


def parse_variants(given: Iterable[str] | Mapping[str, str | FusionConfig]) -> list[Variant]:
    """Parses the user's settings into variants. The base comes first and appears once.

    Args:
        given: Specifications (``"default"``, ``"contrast:strength=2"``, ``"wordfilter"``,
            ``"mixture@other-calibrator:strength=0.3"``), or a mapping of names to specifications
            or complete ``FusionConfig`` objects.

    Raises:
        ConfigError: A specification is malformed, or two different variants have the same name.
    """
    pairs: Sequence[tuple[str, str | FusionConfig]]
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, str):
        raise ConfigError(f"settings must be a list, not the text {given!r}; write [{given!r}]")
    else:
        pairs = [(_display_name(spec), spec) for spec in given]
    variants = {BASE.name: BASE}
    for name, spec in pairs:
        if isinstance(spec, FusionConfig):
            variant = Variant(name, "fusion", config=spec)
        else:
            variant = dataclasses.replace(parse_variant(spec), name=name)
        if variant.kind == "base":
            continue
        if not name.strip() or name == BASE.name:
            raise ConfigError(
                f"{name!r} cannot name a setting ('base' is the target alone); choose another name"
            )
        if variants.setdefault(name, variant) != variant:
            raise ConfigError(f"two different settings are named {name!r}; give each its own name")
    return list(variants.values())


def parse_variant(spec: str) -> Variant:
    """Parses one specification; see :func:`parse_variants`."""
    head, colon, tail = spec.partition(":")
    rule, at, calibrator = head.partition("@")
    if (at and not calibrator) or (colon and not tail):
        raise ConfigError(f"the setting {spec!r} is not complete; write {_FORM}")
    changes = tuple(_parse_change(spec, part) for part in tail.split(",")) if tail else ()
    if rule in ("base", "wordfilter"):
        if at or changes:
            raise ConfigError(f"{spec!r} is invalid: {rule!r} takes no changes; write {rule!r}")
        return Variant(spec, "base" if rule == "base" else "wordfilter")
    if rule != "default" and rule not in get_args(Rule):
        raise ConfigError(f"the setting {spec!r} is unknown; write {_FORM}")
    chosen: Any = None if rule == "default" else rule
    names = [name for name, _ in changes]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"the setting {spec!r} gives {', '.join(repeated)} twice; give it once")
    return Variant(spec, "fusion", chosen, changes, calibrator=calibrator or None)


def variant_stem(name: str, identity: Mapping[str, Any]) -> str:
    """A readable file name for a variant; it changes if anything in ``identity`` changes."""
    text = json.dumps(identity, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    readable = re.sub(r"[^A-Za-z0-9.=]+", "-", name).strip("-.")[:60]
    return f"{readable}-{digest}" if readable else digest


def _display_name(spec: str) -> str:
    """A specification in which a calibrator's folder is shortened to its name."""
    head, colon, tail = spec.partition(":")
    rule, at, calibrator = head.partition("@")
    return f"{rule}{at}{short_name(calibrator) if calibrator else ''}{colon}{tail}"


def _parse_change(spec: str, part: str) -> tuple[str, Any]:
    name, equals, text = (piece.strip() for piece in part.partition("="))
    if not (name and equals and text):
        raise ConfigError(f"{part!r} in the setting {spec!r} is not name=value; write {_FORM}")
    if text.lower() == "none":
        return name, None
    try:
        return name, float(text)
    except ValueError:
        return name, text
