"""The aligned rules: the calibrator's hidden states, read by the target's output head."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_detox.alignment.embeddings import calibrator_embeddings
from fusion_detox.alignment.store import find_alignment
from fusion_detox.alignment.target_head import TargetHead
from fusion_detox.decoding.head_inputs import output_layer
from fusion_detox.decoding.session import plain_mode
from fusion_detox.errors import AlignmentError, ConfigError
from fusion_detox.fusion import Fusion, fit, prepare, prepare_aligned, times
from fusion_detox.vocabulary.token_table import TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.alignment.alignment import Alignment
    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.config import FusionConfig

logger = logging.getLogger(__name__)


class AlignedTarget:
    """A target's output head, and the matrix that projects a calibrator's vectors to its space.

    The rule ``aligned`` fuses the last hidden states, ``a LN(h_cal A) + (1 - a) h`` (arXiv
    2506.01266). Since the output layer is affine, fusing the logits gives the same result. The rule
    ``aligned_contrast`` projects the clean and the reference model's vectors, applies the
    output head, and then contrasts the two distributions like the rule ``contrast``.

    Args:
        calibrator: The calibrator.
        target: The model that generates.
        tokenizer: The target's tokenizer.
        alignment: By default, the one that was saved for the calibrator and the target.

    Raises:
        AlignmentError: No alignment was found, or it belongs to other models.
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
        widths = calibrator_embeddings(calibrator, "output").weight.shape[1], self.head.width
        if tuple(alignment.matrix.shape) != widths:
            raise AlignmentError(
                f"the alignment projects vectors of width {alignment.matrix.shape[0]} to width "
                f"{alignment.matrix.shape[1]}, but the last hidden states of the calibrator and "
                f"the target have widths {widths[0]} and {widths[1]}: align with "
                "embeddings='output'"
            )
        self._reference_width: int | None = None
        if calibrator.reference is not None:
            weight = output_layer(calibrator.reference).weight
            assert isinstance(weight, Tensor)
            self._reference_width = weight.shape[1]
        token_bytes = TokenTable.from_tokenizer(tokenizer).token_bytes
        self._has_bytes = torch.tensor([one is not None for one in token_bytes])
        self._warned = False
        self._matrices: dict[torch.device, Tensor] = {}

    def check_rule(self, config: FusionConfig) -> None:
        """Check that the rule can be applied.

        Raises:
            ConfigError: A contrast rule is used, but the two models differ in width.
        """
        width = self.alignment.matrix.shape[0]
        if config.contrasts and self._reference_width != width:
            raise ConfigError(
                f"the rule {config.rule!r} projects both models' vectors with one matrix, but the "
                f"clean model's have width {width} and the reference's have "
                f"{self._reference_width}: use rule='aligned'"
            )

    def prepare(
        self,
        scores: Tensor,
        hidden: Tensor,
        config: FusionConfig,
        strength_scale: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Fusion:
        """Prepare one step of fusion.

        Args:
            scores: ``(batch, vocab)``, the target's scores.
            hidden: ``(models, batch, calibrator width)``: the clean model's last hidden states
                and, for ``aligned_contrast``, the reference's.
            config: The settings.
            strength_scale: ``(batch,)``, factor of each row's strength; 1 by default.
            context: ``(batch,)`` factors that ``context_kl`` gives; 1 by default.
        """
        width, device = scores.shape[-1], scores.device
        with plain_mode(hidden.device):
            projected = self._project(hidden, config)
            flat = self.head.uncapped_logits(projected.flatten(0, 1)).to(device)
        logits = flat.view(len(hidden), -1, flat.shape[-1])
        if config.rule == "aligned":
            known = torch.arange(width, device=device) < self.head.columns
            with plain_mode(device):
                target_logits, recovered = self.head.recover_logits(scores)
            if recovered is not None and not bool(recovered.all()):
                known = known & recovered[:, None]
                self._warn(len(scores) - int(recovered.sum()))
            clean = fit(logits[0], width)
            step = prepare_aligned(
                target_logits, clean, known, self.head.cap, config, times(strength_scale, context)
            )
            return dataclasses.replace(step, scores=scores)  # keeps the caller's dtype
        clean, reference = fit(torch.softmax(self.head.apply_cap(logits), -1), width)
        mapped = fit(fit(self._has_bytes, self.head.columns), width).to(device)
        return prepare(scores, clean, reference, mapped, config, strength_scale, context)

    def _project(self, hidden: Tensor, config: FusionConfig) -> Tensor:
        matrix = self._matrices.get(hidden.device)
        if matrix is None:
            matrix = self._matrices[hidden.device] = self.alignment.matrix.to(hidden.device)
        projected = hidden @ matrix
        if config.norm == "none":
            return projected
        projected = F.layer_norm(projected, projected.shape[-1:])
        return projected * self.head.root_mean_square if config.norm == "target" else projected

    def _warn(self, rows: int) -> None:
        if not self._warned:
            logger.warning(
                "%d rows of log-probs are not fused: the target soft-caps its logits, and with so "
                "many forbidden tokens they cannot be recovered from log-probs. Decode "
                "without beam search, or use the contrast rule",
                rows,
            )
        self._warned = True
