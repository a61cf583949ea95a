"""The processor of an engine's worker process, which loads it by name.

Engines send what a request needs to their workers. A calibrator's weights are too large for that,
so a request carries names, and each worker loads the processor once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import Any, NamedTuple

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.lookup import DEFAULT_CALIBRATOR
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError
from fusion_detox.files.models import load_tokenizer
from fusion_detox.processor import FusionLogitsProcessor

__all__ = ["Loaded", "Source"]

_VARIABLES = {
    "tokenizer": "FUSION_DETOX_TOKENIZER",
    "calibrator": "FUSION_DETOX_CALIBRATOR",
    "settings": "FUSION_DETOX_SETTINGS",
    "device": "FUSION_DETOX_DEVICE",
}


class Loaded(NamedTuple):
    """What a worker needs for a step.

    Attributes:
        processor: The processor.
        start_id: The id that begins a text, if there is one.
        end_id: The id that ends a text.
    """

    processor: FusionLogitsProcessor
    start_id: int | None
    end_id: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a worker finds its processor.

    Attributes:
        tokenizer: The target's tokenizer: a folder or hub id.
        calibrator: The path, hub id or shipped name of a calibrator.
        settings: JSON of the fusion settings that differ from those that the calibrator recommends,
            such as ``{"strength": 1.5}``.
        device: Where the calibrator runs; by default on the device of the scores.
    """

    tokenizer: str
    calibrator: str = DEFAULT_CALIBRATOR
    settings: str = "{}"
    device: str | None = None

    @classmethod
    def of_request(
        cls, tokenizer: str, calibrator: str, strength: float | None, settings: dict[str, Any]
    ) -> Source:
        """What a client names for one or more requests.

        Args:
            tokenizer: See the class.
            calibrator: See the class.
            strength: The strength; ``None`` for the one that the calibrator recommends.
            settings: Other fusion settings that differ from those that it recommends.

        Raises:
            ConfigError: A setting is unknown or out of range, which belongs to the client and not
                to a worker.
        """
        if strength is not None:
            settings = {**settings, "strength": strength}
        FusionConfig().replace(**settings)
        return cls(str(tokenizer), str(calibrator), json.dumps(settings, sort_keys=True))

    @classmethod
    def from_environment(cls) -> Source:
        """Read ``FUSION_DETOX_TOKENIZER``, ``…_CALIBRATOR``, ``…_SETTINGS`` and ``…_DEVICE``.

        Raises:
            ConfigError: ``FUSION_DETOX_TOKENIZER`` is not set.
        """
        found = {name: os.environ.get(variable) for name, variable in _VARIABLES.items()}
        given = {name: value for name, value in found.items() if value}
        if "tokenizer" not in given:
            raise ConfigError(
                "FUSION_DETOX_TOKENIZER is not set, so the target's tokenizer is unknown: set it "
                "to the model that the server serves, a folder or hub id"
            )
        return cls(**given)

    def load(self) -> Loaded:
        """The processor, which is loaded once per process.

        Raises:
            CalibratorError: The calibrator cannot be used.
            CalibratorNotFoundError: The calibrator was not found.
            ConfigError: The settings are not a JSON object or are out of range, or the tokenizer
                has no token that ends a text.
            ModelError: The tokenizer cannot be loaded.
            ModelNotFoundError: The tokenizer was not found.
            VocabularyError: The two vocabularies cannot be mapped.
        """
        return _load(self)


@functools.lru_cache(maxsize=8)
def _load(source: Source) -> Loaded:
    try:
        settings = json.loads(source.settings)
    except ValueError as error:
        raise ConfigError(
            f"the fusion settings {source.settings!r} are not JSON ({error}): write an object such "
            'as {"strength": 1.5}'
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"the fusion settings {source.settings!r} must be a JSON object")
    tokenizer = load_tokenizer(source.tokenizer)
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError(f"the tokenizer in {source.tokenizer} has no token that ends a text")
    calibrator = Calibrator.from_pretrained(source.calibrator)
    config = calibrator.config.replace(**settings)
    processor = FusionLogitsProcessor(calibrator, tokenizer, config, device=source.device)
    return Loaded(processor, tokenizer.bos_token_id, end)
