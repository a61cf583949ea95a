"""The settings of a server, and what a client may ask for in a request.

A server is configured by its operator, through the environment or a JSON file. A request may choose
a strength, and a calibrator by a name that the operator has given it. A client never names a path.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fusion_detox.calibrator.folder import check_rule, read_settings
from fusion_detox.calibrator.lookup import DEFAULT_CALIBRATOR, find_calibrator
from fusion_detox.config import FusionConfig, check_number, replace_settings
from fusion_detox.errors import ConfigError, DataFileError
from fusion_detox.files.untrusted import parse_json, read_json

__all__ = ["RequestSettings", "ServerSettings"]

CONFIG_VARIABLE = "FUSION_DETOX_CONFIG"
VARIABLES = ("FUSION_DETOX_CALIBRATOR", "FUSION_DETOX_SETTINGS", "FUSION_DETOX_DEVICE")

_KEYS = ("fusion_strength", "fusion_calibrator")
# Without the prefix, vLLM and other processors would ignore them and nothing would be said.
_MISTAKEN = ("strength", "calibrator")


class RequestSettings(NamedTuple):
    """How a request is fused."""

    calibrator: str
    strength: float


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """What the operator of a server has chosen.

    Attributes:
        calibrators: The calibrators that requests may name: their names, and for each the path,
            hub id or shipped name of a calibrator. The first is the default.
        settings: Fusion settings that differ from those that the calibrators recommend, such as
            ``{"strength": 1.5}``.
        device: Where the calibrators run; by default on the device of the logits.
        min_strength: The smallest strength that a request may ask for. Above 0, no request can
            switch fusion off.
        max_strength: The largest strength that a request may ask for; ``None`` leaves it to the
            fusion rule.
        metrics_port: The port of this machine at which Prometheus reads the metrics of
            ``fusion_detox.integrations.metrics``; ``None`` for none.

    Raises:
        CalibratorError: A calibrator cannot be used.
        CalibratorNotFoundError: A calibrator was not found.
        ConfigError: A setting is unknown or out of range, or does not fit a calibrator.
    """

    calibrators: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {DEFAULT_CALIBRATOR: DEFAULT_CALIBRATOR}
    )
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device: str | None = None
    min_strength: float = 0.0
    max_strength: float | None = None
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("calibrators", "a name and a path"), ("settings", "a name and value")):
            if not isinstance(getattr(self, name), dict):
                raise ConfigError(f"{name} must be a JSON object with {kind} for each entry")
        if not self.calibrators or not all(isinstance(v, str) for v in self.calibrators.values()):
            raise ConfigError(
                "calibrators must hold at least one entry, such as "
                f'{{"{DEFAULT_CALIBRATOR}": "{DEFAULT_CALIBRATOR}"}}'
            )
        check_number("min_strength", self.min_strength, 0.0)
        if self.max_strength is not None:
            check_number("max_strength", self.max_strength, self.min_strength)
        if self.metrics_port is not None:
            check_number("metrics_port", self.metrics_port, 1, 65535, whole=True)
        for name in self.configs:
            self._check_strength(name, self.configs[name].strength)

    @functools.cached_property
    def configs(self) -> dict[str, FusionConfig]:
        """The fusion settings of each calibrator, by its name."""
        return {name: self._config(source) for name, source in self.calibrators.items()}

    @classmethod
    def from_environment(cls) -> ServerSettings:
        """Read the file that ``FUSION_DETOX_CONFIG`` names, or the single variables.

        The file is a JSON object of the attributes above. Without it, ``FUSION_DETOX_CALIBRATOR``
        names the only calibrator, ``FUSION_DETOX_SETTINGS`` holds ``settings`` as JSON, and
        ``FUSION_DETOX_DEVICE`` is ``device``. All are optional. A process reads them once.

        Raises:
            CalibratorError: See the class.
            CalibratorNotFoundError: See the class.
            ConfigError: See the class. Or both the file and single variables are set.
            DataFileError: The file is missing or cannot be read.
        """
        return _from_variables(
            os.environ.get(CONFIG_VARIABLE), *(os.environ.get(name) for name in VARIABLES)
        )

    def of_request(self, asked: Mapping[str, Any] | None) -> RequestSettings:
        """Check what a request asks for.

        Args:
            asked: The request's arguments. ``fusion_strength`` is a number, and 0 switches fusion
                off. ``fusion_calibrator`` is the name of a calibrator. Arguments of other logits
                processors are ignored.

        Raises:
            ConfigError: A value is unknown or out of range, or an argument looks like one of these
                but is not. The message is meant for the client.
        """
        asked = asked or {}
        for key in asked:
            if key in _MISTAKEN or (key.startswith("fusion") and key not in _KEYS):
                raise ConfigError(f"unknown argument {_short(key)}: use {' or '.join(_KEYS)}")
        name = asked.get("fusion_calibrator")
        if name is None:
            name = next(iter(self.calibrators))
        if not isinstance(name, str) or name not in self.calibrators:
            raise ConfigError(
                f"fusion_calibrator is {_short(name)}, which this server does not have: use "
                f"{' or '.join(self.calibrators)}"
            )
        strength = asked.get("fusion_strength")
        if strength is None:
            return RequestSettings(name, self.configs[name].strength)
        if not isinstance(strength, (int, float)):
            raise ConfigError(f"fusion_strength must be a number, but is {_short(strength)}")
        try:
            strength = self.configs[name].replace(strength=strength).strength
        except ConfigError as error:
            raise ConfigError(f"fusion_{error}") from error
        self._check_strength(name, strength)
        return RequestSettings(name, float(strength))

    def _config(self, source: str) -> FusionConfig:
        found = read_settings(find_calibrator(source))
        config = replace_settings(found.fusion, dict(self.settings), "fusion")
        check_rule(config, "reference" in found.distributions)
        if config.aligned:
            raise ConfigError(
                f"the rule {config.rule!r} needs the target's output layer, which a server does "
                "not hand out: use the rule contrast, product or mixture"
            )
        return config

    def _check_strength(self, name: str, strength: float) -> None:
        if strength < self.min_strength:
            raise ConfigError(
                f"strength {strength:g} is below {self.min_strength:g}, the smallest that this "
                f"server allows (calibrator {name})"
            )
        if self.max_strength is not None and strength > self.max_strength:
            raise ConfigError(
                f"strength {strength:g} is above {self.max_strength:g}, the largest that this "
                f"server allows (calibrator {name})"
            )


@functools.lru_cache(maxsize=8)
def _from_variables(
    path: str | None, calibrator: str | None, settings: str | None, device: str | None
) -> ServerSettings:
    if path:
        if calibrator or settings or device:
            raise ConfigError(
                f"{CONFIG_VARIABLE} is set, and so is {' or '.join(VARIABLES)}: put all settings "
                "into the file, or unset its variable"
            )
        return _from_file(Path(path))
    values: dict[str, Any] = {"device": device or None}
    if calibrator:
        # A client sees the name, and need not see the path.
        values["calibrators"] = {Path(calibrator).name: calibrator}
    if settings:
        try:
            values["settings"] = parse_json(settings)
        except ValueError as error:
            raise ConfigError(
                f"FUSION_DETOX_SETTINGS is not JSON ({error}): write an object such as "
                '{"strength": 1.5}'
            ) from error
    return ServerSettings(**values)


def _from_file(path: Path) -> ServerSettings:
    try:
        values = read_json(path)
    except OSError as error:
        raise DataFileError(
            f"{CONFIG_VARIABLE} names {path}, which cannot be read: {error.strerror or error}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    known = [field.name for field in dataclasses.fields(ServerSettings)]
    if not isinstance(values, dict) or set(values) - set(known):
        unknown = ", ".join(sorted(set(values) - set(known))) if isinstance(values, dict) else ""
        raise ConfigError(
            f"{path} must hold a JSON object with some of {', '.join(known)}"
            + (f"; unknown: {unknown}" if unknown else "")
        )
    try:
        return ServerSettings(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _short(value: object) -> str:
    """A client's value, within a length that fits a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
