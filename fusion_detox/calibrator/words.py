"""Reads the words that a calibrator holds back in any text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusion_detox.config import check_number
from fusion_detox.errors import CalibratorError, ConfigError
from fusion_detox.vocabulary.words import is_word


def read_words(values: Mapping[str, Any]) -> dict[str, float]:
    """Words with the nats by which each is held back, from a JSON object.

    Raises:
        CalibratorError: A word is not made of lower-case letters, or its number is not above 0.
    """
    found = {}
    for word, nats in values.items():
        if not is_word(word):
            raise CalibratorError(
                f"words has {word!r}, but a listed word is letters alone, in lower case: split or "
                "correct it, or remove it"
            )
        try:
            check_number(f"words[{word!r}]", nats, 0.0, above=True, largest=1e4)
        except ConfigError as error:
            raise CalibratorError(f"{error}: give the nats by which to hold it back") from error
        found[word] = float(nats)
    return found
