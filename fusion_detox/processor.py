"""``FusionLogitsProcessor``: what ``generate()`` calls. Context, session, map and rule in a row."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor

from fusion_detox.calibrator import Calibrator
from fusion_detox.config import FusionConfig
from fusion_detox.context import Position, TextContext
from fusion_detox.errors import ConfigError, VocabularyError
from fusion_detox.fusion import fuse, strength_used
from fusion_detox.session import CalibratorSession
from fusion_detox.tokens import TokenTable
from fusion_detox.vocabulary import Cover, VocabularyMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_PADDING = 2048
"""Columns that a head may have beyond its tokenizer (phi-2 has 943)."""


class FusionLogitsProcessor(LogitsProcessor):
    """Fuses a calibrator into the logits of any target at each step of ``generate()``.

        processor = FusionLogitsProcessor(calibrator, tokenizer)
        model.generate(**inputs, logits_processor=[processor])

    The result is a pure function of ``(input_ids, scores)``: the KV cache inside is only a memo.
    One instance serves any number of calls, batches, beams and threads, and needs no reset.
    ``generate`` runs it before temperature, top-k and top-p, and hands it no attention mask:
    left padding is recognised by ``pad_token_id``.

    Args:
        calibrator: A ``Calibrator``, or the path, hub id or shipped name of one.
        tokenizer: The target's tokenizer.
        config: Fusion settings; the calibrator's recommended ones by default.
        device: Where the calibrator runs; where the scores are by default.
        pad_token_id: The target's padding; the tokenizer's by default.

    Raises:
        CalibratorError: The calibrator cannot be used.
        ConfigError: The contrast rule is asked of a calibrator without a reference.
        VocabularyError: The two vocabularies cannot be mapped onto each other.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        calibrator: Calibrator | str,
        tokenizer: PreTrainedTokenizerBase,
        config: FusionConfig | None = None,
        *,
        device: torch.device | str | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        if isinstance(calibrator, str):
            calibrator = Calibrator.from_pretrained(calibrator)
        if not isinstance(calibrator, Calibrator):
            raise ConfigError(
                "calibrator must be a Calibrator or the name of one, "
                f"not {type(calibrator).__name__}"
            )
        self.calibrator = calibrator
        self.config = calibrator.config if config is None else config
        if self.config.rule == "contrast" and calibrator.reference is None:
            raise ConfigError(
                "the contrast rule needs a calibrator with a reference model, and this one has "
                "none: choose rule='product' or rule='mixture'"
            )
        if pad_token_id is None:
            pad_token_id = tokenizer.pad_token_id
        tokens = TokenTable.from_tokenizer(tokenizer)
        self.vocabulary = VocabularyMap.build(calibrator, tokens, tokenizer)
        identity = self.vocabulary.kind == "identity"
        self._context = TextContext(calibrator, tokens, identity, pad_token_id)
        self._device = None if device is None else torch.device(device)
        self._sessions: dict[torch.device, CalibratorSession] = {}
        self._mapped = self.vocabulary.mapped
        self._narrowest = int(self._mapped.nonzero().max()) + 1
        self._tokens = len(tokens.pieces)
        self._widest = self._tokens + max(_PADDING, self._tokens // 20)
        self._warned = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores after fusion.

        Args:
            input_ids: ``(batch, length)`` token ids of the target, left padded or not.
            scores: ``(batch, vocab)`` logits or log-probs; not changed.

        Returns:
            ``(batch, vocab)`` log-probs on the device and in the dtype of ``scores``, or ``scores``
            itself at strength 0.

        Raises:
            VocabularyError: The scores are far wider than the tokenizer's vocabulary.
        """
        if self.config.strength == 0 or not self._is_of_target(scores):
            return scores
        clean, reference = self._distributions(input_ids, scores.shape[-1], scores.device)
        mapped = self._fit(self._mapped.to(scores.device), scores.shape[-1])
        return fuse(scores, clean, reference, mapped, self.config)

    def with_strength(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The scores after fusion, and how strongly each row was fused.

        Args:
            input_ids: See ``__call__``.
            scores: See ``__call__``.

        Returns:
            What ``__call__`` returns, and ``(batch,)`` strengths in float32: those of the settings,
            or less where ``kl_budget`` lowers them.

        Raises:
            VocabularyError: See ``__call__``.
        """
        if self.config.strength == 0 or not self._is_of_target(scores):
            return scores, torch.zeros(len(scores), device=scores.device)
        clean, reference = self._distributions(input_ids, scores.shape[-1], scores.device)
        mapped = self._fit(self._mapped.to(scores.device), scores.shape[-1])
        arguments = (scores, clean, reference, mapped, self.config)
        return fuse(*arguments), strength_used(*arguments)

    def reset(self) -> None:
        """Frees the memory of the cache. Results do not depend on it."""
        for session in list(self._sessions.values()):
            session.reset()

    def _distributions(
        self, input_ids: Tensor, width: int, scores_device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Clean and reference probabilities in the target's vocabulary, ``(batch, width)``."""
        positions = [self._context.read(tuple(row)) for row in input_ids.tolist()]
        device = self._device or scores_device
        session = self._sessions.get(device)
        if session is None:
            session = self._sessions.setdefault(
                device, CalibratorSession(self.calibrator, device=device)
            )
        wanted: dict[tuple[int, ...], int] = {}
        for position in positions:
            for back in range(len(position.word) + 1):
                wanted.setdefault(position.path[: len(position.path) - back], len(wanted))
        log_probs = session.log_probs(list(wanted))
        covers, weights = _covers(positions, wanted, log_probs)
        projected = self.vocabulary.project(
            log_probs.exp(),
            covers,
            weights,
            len(positions),
            mode="prefix" if self.config.rule == "contrast" else "transfer",
        )
        projected = self._fit(projected, width).to(scores_device)
        return projected[0], projected[1] if len(projected) > 1 else None

    def _is_of_target(self, scores: Tensor) -> bool:
        """Whether scores can be of the target; those of another, smaller vocabulary pass."""
        if scores.shape[-1] > self._widest:
            raise VocabularyError(
                f"scores have {scores.shape[-1]} columns, but the tokenizer given has "
                f"{self._tokens} tokens: give the tokenizer of the model that generates"
            )
        if scores.shape[-1] < self._narrowest:
            self._warn_once(scores.shape[-1])
            return False
        return True

    @staticmethod
    def _fit(tensor: Tensor, width: int) -> Tensor:
        """Zeros for the rows of a padded head, or without the ids that a head does not have."""
        missing = width - tensor.shape[-1]
        return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor

    def _warn_once(self, width: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "scores have %d columns, but the target's tokenizer has %d tokens: they belong to "
                "another model (an assistant, say) and are passed on unchanged",
                width,
                self._narrowest,
            )


def _covers(
    positions: list[Position], index: dict[tuple[int, ...], int], log_probs: Tensor
) -> tuple[list[Cover], Tensor]:
    """The ways to read each text's end, and their weights ``(distributions, covers)``.

    A cover that starts ``back`` tokens before the end weighs what the calibrator gave to the
    tokens from the start of the word up to there (Vieira et al. 2024; Hayase et al. 2025).
    """
    covers: list[Cover] = []
    gather: list[list[tuple[int, int]]] = []
    for row, position in enumerate(positions):
        depth = len(position.word)
        steps: list[tuple[int, int]] = []
        for back in range(depth, -1, -1):
            cut = len(position.path) - back
            prefix = position.path[:cut]
            remainder = b"".join(position.word[depth - back :]) + position.pending
            covers.append(Cover(row, index[prefix], remainder))
            gather.append(list(steps))
            if back:
                steps.append((index[prefix], position.path[cut]))
    longest = max(map(len, gather))
    if longest == 0:
        return covers, log_probs.new_ones(len(log_probs), len(covers))
    # The ragged lists are filled up with an entry that is masked.
    where = torch.tensor([[p for p, _ in g] + [0] * (longest - len(g)) for g in gather])
    token = torch.tensor([[t for _, t in g] + [0] * (longest - len(g)) for g in gather])
    used = torch.tensor([[True] * len(g) + [False] * (longest - len(g)) for g in gather])
    device = log_probs.device
    steps_in = log_probs[:, where.to(device), token.to(device)].masked_fill(~used.to(device), 0.0)
    weights = steps_in.sum(-1)
    # Only proportions within a row count: without its largest weight, none underflows.
    row_of = torch.tensor([cover.row for cover in covers], device=device).expand_as(weights)
    largest = weights.new_full((len(weights), len(positions)), -torch.inf)
    largest = largest.scatter_reduce(1, row_of, weights, "amax")
    return covers, (weights - largest.gather(1, row_of)).exp()
