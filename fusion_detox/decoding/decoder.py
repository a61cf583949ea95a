"""How a calibrator's models are run: generically, or two Llamas at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusion_detox.decoding.generic_decoder import GenericDecoder, check_configurations
from fusion_detox.decoding.slots import Decoder, Row, SlotStore
from fusion_detox.decoding.stacked_llama import StackedLlamaDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion_detox.calibrator.calibrator import Calibrator

__all__ = [
    "Decoder",
    "GenericDecoder",
    "Row",
    "SlotStore",
    "StackedLlamaDecoder",
    "build_decoder",
    "check_calibrator",
]


def build_decoder(calibrator: Calibrator, device: torch.device) -> Decoder:
    """The fastest decoder that runs a calibrator's models on a device.

    Raises:
        ModelError: None can; the message says why.
    """
    models = _models(calibrator)
    length = calibrator.context_length
    if StackedLlamaDecoder.supports(models):
        return StackedLlamaDecoder(models, length, calibrator.vocabulary_size, device)
    return GenericDecoder(models, length, device)


def check_calibrator(calibrator: Calibrator) -> None:
    """Refuse, without running them, models of which ``build_decoder`` would refuse the settings.

    Raises:
        ModelError: A model keeps no cache that can be taken back, or it is too short.
    """
    check_configurations(_models(calibrator), calibrator.context_length)


def _models(calibrator: Calibrator) -> list[PreTrainedModel]:
    reference = calibrator.reference
    return [calibrator.clean] if reference is None else [calibrator.clean, reference]
