"""What an evaluation compares: the target alone, fusion in some settings, the word filter."""

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

Kind = Literal["base", "fusion", "wordfilter"]
_FORM = (
    "base, wordfilter, default, or a rule with changes such as contrast:strength=2,threshold=0.3"
)
# The plain rules of the literature, without what our contrast adds to them.
_PLAIN = {"plausibility": 0.0, "outside": "keep", "kl_budget": None, "context_kl": None}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One column of a report.

    Attributes:
        name: As the user wrote it; ``"base"`` is the target alone.
        kind: What runs beside the target.
        rule: Of a fusion; ``None`` for the calibrator's recommended one.
        changes: Fusion settings that differ from where the rule starts.
        config: The whole fusion settings, where they were given as such.
        calibrator: Name, folder or hub id of a calibrator other than the run's.
    """

    name: str
    kind: Kind
    rule: Rule | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    config: FusionConfig | None = None
    calibrator: str | None = None

    def resolve(self, recommended: FusionConfig) -> FusionConfig:
        """The fusion settings, given those that the calibrator recommends.

        A rule starts from the recommended settings where they have the same rule. ``mixture``,
        ``product`` and ``aligned`` else start plain, with every token judged.

        Raises:
            ConfigError: A name is unknown or a value out of range.
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


BASE = Setting("base", "base")


def parse_settings(
    given: Iterable[str] | Mapping[str, str | FusionConfig],
) -> list[Setting]:
    """Settings from what a user wrote; the base comes first, always and once.

    Args:
        given: Specifications (``"default"``, ``"contrast:strength=2"``, ``"wordfilter"``,
            ``"mixture@other-calibrator:strength=0.3"``), or a mapping of names to such or to whole
            ``FusionConfig`` objects.

    Raises:
        ConfigError: A specification cannot be read, or two settings share a name.
    """
    pairs: Sequence[tuple[str, str | FusionConfig]]
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, str):
        raise ConfigError(f"settings must be a list, not the text {given!r}; write [{given!r}]")
    else:
        pairs = [(_without_path(spec), spec) for spec in given]
    settings = [BASE]
    for name, spec in pairs:
        if isinstance(spec, FusionConfig):
            setting = Setting(name, "fusion", config=spec)
        else:
            setting = dataclasses.replace(parse_setting(spec), name=name)
        if setting.kind == "base":
            continue
        if not name.strip() or name == "base":
            raise ConfigError(f"{name!r} is no name for a setting; the target alone is 'base'")
        same = next((one for one in settings if one.name == name), None)
        if same is not None and same != setting:
            raise ConfigError(f"two different settings are named {name!r}; give each its own name")
        if same is None:
            settings.append(setting)
    return settings


def parse_setting(spec: str) -> Setting:
    """One setting from its specification, see :func:`parse_settings`."""
    head, colon, tail = spec.partition(":")
    rule, at, calibrator = head.partition("@")
    if (at and not calibrator) or (colon and not tail):
        raise ConfigError(f"the setting {spec!r} is not complete; write {_FORM}")
    changes = tuple(_change(spec, part) for part in tail.split(",")) if tail else ()
    if rule in ("base", "wordfilter"):
        if at or changes:
            raise ConfigError(f"the setting {rule!r} takes nothing more, but is {spec!r}")
        return Setting(spec, "base" if rule == "base" else "wordfilter")
    if rule != "default" and rule not in get_args(Rule):
        raise ConfigError(f"the setting {spec!r} is unknown; write {_FORM}")
    chosen: Any = None if rule == "default" else rule
    twice = {name for name, _ in changes if [n for n, _ in changes].count(name) > 1}
    if twice:
        raise ConfigError(f"the setting {spec!r} gives {', '.join(sorted(twice))} twice")
    return Setting(spec, "fusion", chosen, changes, calibrator=calibrator or None)


def setting_stem(name: str, identity: Mapping[str, Any]) -> str:
    """A file name for what belongs to a setting: readable, and another one if anything differs."""
    text = json.dumps(identity, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    readable = re.sub(r"[^A-Za-z0-9.=]+", "-", name).strip("-.")[:60]
    return f"{readable}-{digest}" if readable else digest


def _without_path(spec: str) -> str:
    """A specification as the report names it: a calibrator's folder by its name."""
    head, colon, tail = spec.partition(":")
    rule, at, calibrator = head.partition("@")
    return f"{rule}{at}{short_name(calibrator) if calibrator else ''}{colon}{tail}"


def _change(spec: str, part: str) -> tuple[str, Any]:
    name, equals, text = (piece.strip() for piece in part.partition("="))
    if not (name and equals and text):
        raise ConfigError(f"{part!r} in the setting {spec!r} is not name=value; write {_FORM}")
    if text.lower() == "none":
        return name, None
    try:
        return name, float(text)
    except ValueError:
        return name, text
