"""Chooses how to run a calibrator's models: two Llamas at once, or any models one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fusion_detox.decoding.decoder import Decoder
from fusion_detox.decoding.generic_decoder import GenericDecoder, check_configurations
from fusion_detox.decoding.stacked_llama import StackedLlamaDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion_detox.calibrator.calibrator import Calibrator


def build_decoder(
    calibrator: Calibrator, device: torch.device, *, reference: bool = True
) -> Decoder:
    """The fastest decoder that runs a calibrator's models on a device.

    Args:
        calibrator: Its models are read, never changed.
        device: Where to run.
        reference: Whether to run the reference model too, if there is one.

    Raises:
        ModelError: No decoder can run them; the message says why.
    """
    models = _models(calibrator) if reference else [calibrator.clean]
    length = calibrator.context_length
    if StackedLlamaDecoder.supports(models):
        return StackedLlamaDecoder(models, length, calibrator.vocabulary_size, device)
    return GenericDecoder(models, length, device)


def check_calibrator(calibrator: Calibrator) -> None:
    """Refuses models whose configuration shows that ``build_decoder`` would refuse them.

    No model is run.

    Raises:
        ModelError: A model has no cache that can be rolled back, or too short a context.
    """
    check_configurations(_models(calibrator), calibrator.context_length)


def _models(calibrator: Calibrator) -> list[PreTrainedModel]:
    reference = calibrator.reference
    return [calibrator.clean] if reference is None else [calibrator.clean, reference]
