"""The aligned rules: the calibrator's hidden states, seen through the target's output layer."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_detox.alignment.embeddings import of_calibrator
from fusion_detox.alignment.store import find_alignment
from fusion_detox.alignment.target_head import TargetHead
from fusion_detox.decoding.head_inputs import output_layer
from fusion_detox.decoding.session import plain_mode
from fusion_detox.errors import AlignmentError, ConfigError
from fusion_detox.fusion import Fusion, fit, prepare, prepare_aligned
from fusion_detox.vocabulary.token_table import TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.alignment.alignment import Alignment
    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.config import FusionConfig

logger = logging.getLogger(__name__)


class AlignedTarget:
    """A target's output layer, with the matrix that carries a calibrator's vectors to it.

    ``aligned`` fuses the last hidden states ``a LN(h_cal A) + (1 - a) h`` (arXiv 2506.01266), on
    logits: the output layer is affine, so that both give the same. ``aligned_contrast`` takes the
    clean and the reference vector through ``A`` and the output layer and goes on like the
    contrast rule.

    Args:
        calibrator: Whose vectors.
        target: The model that generates.
        tokenizer: The target's.
        alignment: By default the one that is saved for the two.

    Raises:
        AlignmentError: There is none, or it belongs to other models.
        ModelError: The target's hidden states cannot be fused.
    """

    def __init__(
        self,
        calibrator: Calibrator,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        alignment: Alignment | None,
    ) -> None:
        self.head = TargetHead(target, tokenizer)
        if alignment is None:
            alignment = find_alignment(calibrator, target, tokenizer)
        else:
            alignment.check_calibrator(calibrator)
            alignment.check_target(target, tokenizer)
        self.alignment = alignment
        widths = (of_calibrator(calibrator, "output").weight.shape[1], self.head.width)
        if tuple(alignment.matrix.shape) != widths:
            raise AlignmentError(
                f"the alignment carries vectors of {alignment.matrix.shape[0]} entries to "
                f"{alignment.matrix.shape[1]}, but the last hidden states of calibrator and target "
                f"have {widths[0]} and {widths[1]}: align with embeddings='output'"
            )
        reference = calibrator.reference
        self._reference_width = None
        if reference is not None:
            weight = output_layer(reference).weight
            assert isinstance(weight, Tensor)
            self._reference_width = weight.shape[1]
        pieces = TokenTable.from_tokenizer(tokenizer).token_bytes[: self.head.columns]
        spelled = [piece is not None for piece in pieces]
        self._spelled = torch.tensor(spelled + [False] * (self.head.columns - len(spelled)))
        self._warned = False
        self._matrices: dict[torch.device, Tensor] = {}

    def check_rule(self, config: FusionConfig) -> None:
        """Refuse a contrast of vectors of two lengths; else ``ConfigError``."""
        width = self.alignment.matrix.shape[0]
        if config.contrasts and self._reference_width != width:
            raise ConfigError(
                f"the rule {config.rule!r} carries both models' vectors over with one matrix, but "
                f"the clean model's have {width} entries and the reference's "
                f"{self._reference_width}: use rule='aligned'"
            )

    def prepare(
        self, scores: Tensor, hidden: Tensor, config: FusionConfig, share: Tensor | None = None
    ) -> Fusion:
        """One step.

        Args:
            scores: ``(batch, vocab)`` of the target.
            hidden: ``(distributions, batch, calibrator width)``.
            config: The settings.
            share: ``(batch,)`` of the strength that each row gets; all of it by default.
        """
        width = scores.shape[-1]
        with plain_mode(hidden.device):
            carried = self._carry(hidden, config)
            flat = self.head.carried(carried.flatten(0, 1)).to(scores.device)
        logits = flat.view(len(hidden), -1, flat.shape[-1])
        known = torch.arange(width, device=scores.device) < self.head.columns
        if config.rule == "aligned":
            with plain_mode(scores.device):
                whole, sure = self.head.logits(scores)
            if sure is not None and not bool(sure.all()):
                known = known & sure[:, None]
                self._warn(len(scores) - int(sure.sum()))
            carried = fit(logits[0], width)
            step = prepare_aligned(whole, carried, known, self.head.cap, config, share)
            return dataclasses.replace(step, scores=scores)  # of the caller's dtype
        laws = torch.softmax(self.head.bounded(logits), -1)
        spelled = fit(self._spelled.to(scores.device), width)
        clean, reference = (fit(law, width) for law in laws)
        return prepare(scores, clean, reference, spelled, config, share)

    def _warn(self, rows: int) -> None:
        if not self._warned:
            logger.warning(
                "%d rows of log-probs are passed on as they are: the target's logits are soft-"
                "capped, and with so many forbidden tokens the logits behind log-probs cannot be "
                "told",
                rows,
            )
        self._warned = True

    def _carry(self, hidden: Tensor, config: FusionConfig) -> Tensor:
        matrix = self._matrices.get(hidden.device)
        if matrix is None:
            matrix = self.alignment.matrix.to(hidden.device)
            self._matrices[hidden.device] = matrix
        carried = hidden @ matrix
        if config.norm == "none":
            return carried
        carried = F.layer_norm(carried, carried.shape[-1:])
        return carried * self.head.root_mean_square if config.norm == "target" else carried
