"""How a calibrator's models are run: generically, or two Llamas at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusion_detox.decoders.generic import GenericDecoder
from fusion_detox.decoders.slots import Decoder, Row, SlotStore
from fusion_detox.decoders.stacked_llama import StackedLlamaDecoder

if TYPE_CHECKING:
    from fusion_detox.calibrator import Calibrator

__all__ = [
    "Decoder",
    "GenericDecoder",
    "Row",
    "SlotStore",
    "StackedLlamaDecoder",
    "build_decoder",
]


def build_decoder(calibrator: Calibrator, device: torch.device) -> Decoder:
    """The fastest decoder that runs a calibrator's models on a device.

    Raises:
        ModelError: None can; the message says why.
    """
    models = [calibrator.clean]
    if calibrator.reference is not None:
        models.append(calibrator.reference)
    length = calibrator.context_length
    if StackedLlamaDecoder.supports(models):
        return StackedLlamaDecoder(models, length, calibrator.vocabulary_size, device)
    return GenericDecoder(models, length, device)
