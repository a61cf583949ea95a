"""``FusionLogitsProcessor``: what ``generate()`` calls. Context, session, map and rule in a row."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from fusion_detox.alignment.aligned_rule import AlignedTarget
from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.folder import check_rule
from fusion_detox.config import FusionConfig
from fusion_detox.decoding.covers import weigh_covers
from fusion_detox.decoding.decoder import check_calibrator
from fusion_detox.decoding.paged import watch_paged_generation
from fusion_detox.decoding.session import CalibratorSession, plain_mode
from fusion_detox.decoding.target_columns import TargetColumns, fit
from fusion_detox.decoding.text_context import Position, TextContext
from fusion_detox.errors import ConfigError
from fusion_detox.fusion import Fusion, prepare
from fusion_detox.vocabulary.map import Mode, VocabularyMap
from fusion_detox.vocabulary.token_table import TokenTable, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.alignment.alignment import Alignment

logger = logging.getLogger(__name__)


class FusionLogitsProcessor(LogitsProcessor):
    """Fuses a calibrator into the logits of any target at each step of ``generate()``.

        processor = FusionLogitsProcessor(calibrator, tokenizer)
        model.generate(**inputs, logits_processor=[processor])

    The result is a pure function of ``(input_ids, scores)``: the KV cache inside is only a memo.
    One instance serves any number of calls, batches, beams and threads, and needs no reset.
    ``generate`` runs it before temperature, top-k and top-p, and hands it no attention mask:
    left padding is recognised by ``pad_token_id``. Text that it is not shown (``inputs_embeds``, an
    encoder's source, what is already in ``past_key_values``) can be handed over, see ``following``.

    Args:
        calibrator: A ``Calibrator``, or the path, hub id or shipped name of one.
        tokenizer: The target's tokenizer.
        config: Fusion settings; the calibrator's recommended ones by default.
        device: Where the calibrator runs; where the scores are by default.
        pad_token_id: The target's padding; the tokenizer's by default.
        assistant_tokenizer: The tokenizer given to ``generate`` under the same name, if any. Drafts
            in its vocabulary pass unchanged, and the target's check of them is fused.
        target: The target itself, for the aligned rules, which need its output layer; it is run
            once on a few tokens. No other rule looks at it.
        alignment: How they carry the calibrator's vectors over to it; by default what
            ``fusion-detox align`` saved for the two.

    Raises:
        AlignmentError: An aligned rule has no alignment, or one of other models.
        CalibratorError: The calibrator cannot be used.
        ConfigError: A contrast rule or ``context_kl`` is asked of a calibrator without a reference,
            or an aligned rule without a target.
        ModelError: The calibrator's models cannot be run with a cache that can be taken back, or
            the target's hidden states cannot be fused.
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
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
        target: PreTrainedModel | None = None,
        alignment: Alignment | None = None,
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
        self._aligned: AlignedTarget | None = None
        if self.config.aligned and target is not None:
            self._aligned = AlignedTarget(calibrator, target, tokenizer, alignment)
        self._check_rule()
        check_calibrator(calibrator)
        if pad_token_id is None:
            pad_token_id = tokenizer.pad_token_id
        self._tokenizer = tokenizer
        tokens = TokenTable.from_tokenizer(tokenizer)
        with plain_mode(calibrator.clean.device):  # it is kept for processes without autocast
            self.vocabulary = VocabularyMap.build(calibrator, tokens, tokenizer)
        identity = self.vocabulary.kind == "identity"
        self._context = TextContext(calibrator, tokens, identity, pad_token_id)
        self._device = None if device is None else torch.device(device)
        self._sessions: dict[tuple[torch.device, bool], CalibratorSession] = {}
        self._mapped = self.vocabulary.mapped
        assistant = 0 if assistant_tokenizer is None else len(assistant_tokenizer)
        self._columns = TargetColumns(self._mapped, assistant)
        self._starts = tokens.reset_ids | {pad_token_id}
        self._before: list[tuple[int, ...]] = []
        self._warned: set[str] = set()  # copies share it
        watch_paged_generation()

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
        return self.fuse_rows(self._rows(input_ids), scores)

    def fuse_rows(self, rows: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """What calling it does, for rows of any lengths: to serve other engines than ``generate``.

        Args:
            rows: For each row all ids of its text so far; no padding is needed.
            scores: See ``__call__``.

        Returns:
            See ``__call__``.

        Raises:
            VocabularyError: See ``__call__``.
        """
        if self.config.strength == 0 or not self._columns.hold(scores):
            return scores
        return self._prepare(rows, scores).fused()

    def with_strength(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The scores after fusion, and how strongly each row was fused.

        Args:
            input_ids: See ``__call__``.
            scores: See ``__call__``.

        Returns:
            What ``__call__`` returns, and ``(batch,)`` strengths in float32: those of the settings,
            or less where ``context_kl`` or ``kl_budget`` lowers them.

        Raises:
            VocabularyError: See ``__call__``.
        """
        if self.config.strength == 0 or not self._columns.hold(scores):
            return scores, torch.zeros(len(scores), device=scores.device)
        step = self._prepare(self._rows(input_ids), scores)
        return step.fused(), step.strength()

    def following(self, text: str | Sequence[str]) -> FusionLogitsProcessor:
        """A processor for rows that go on from text which ``generate`` does not show it.

        For prompts given as ``inputs_embeds`` alone, for the source of an encoder-decoder, and for
        the ids behind ``past_key_values`` where only new ones are passed. It shares this
        processor's models and caches.

        Args:
            text: What comes before every row, or for each prompt of the batch what comes before
                its rows. It is joined as it stands: end it with a line break where the rows begin
                a text of their own.

        Raises:
            ConfigError: There is no text, or (when it is called) rows cannot be shared out evenly.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ConfigError("following() was given no text: give one, or one for each prompt")
        result = copy.copy(self)
        result._before = [tuple(ids) for ids in encode(self._tokenizer, texts)]
        return result

    @property
    def alignment(self) -> Alignment | None:
        """What the aligned rules carry the calibrator's vectors over with; else ``None``."""
        return None if self._aligned is None else self._aligned.alignment

    @property
    def prompts_followed(self) -> int:
        """How many texts ``following`` was given; 0 for a processor of its own."""
        return len(self._before)

    def with_settings(self, **changes: Any) -> FusionLogitsProcessor:
        """A processor with other settings, which shares this one's models and caches.

        Args:
            changes: Settings of :class:`FusionConfig`, say ``strength=0.5``.

        Raises:
            ConfigError: A setting is unknown or out of range, or needs a reference model that the
                calibrator does not have, or a target that this processor was not given.
        """
        result = copy.copy(self)
        result.config = self.config.replace(**changes)
        result._check_rule()
        return result

    def reset(self) -> None:
        """Frees the memory of the cache. Results do not depend on it."""
        self._context.reset()
        for session in list(self._sessions.values()):
            session.reset()

    def _check_rule(self) -> None:
        check_rule(self.config, self.calibrator.reference is not None)
        if not self.config.aligned:
            return
        if self._aligned is None:
            raise ConfigError(
                f"the rule {self.config.rule!r} works on the target's output layer: give the model "
                f"that generates, FusionLogitsProcessor(..., FusionConfig(rule="
                f"{self.config.rule!r}), target=model)"
            )
        self._aligned.check_rule(self.config)

    def _rows(self, input_ids: Tensor) -> list[list[int]]:
        if input_ids.shape[-1] == 0 and not self._before and not self._warned:
            self._warned.add("no ids")
            logger.warning(
                "input_ids are empty, as with inputs_embeds alone, whose text cannot be read: the "
                "calibrator sees only what is written from here on. Give input_ids beside "
                "inputs_embeds, or use processor.following(text)"
            )
        rows: list[list[int]] = input_ids.tolist()
        return rows

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The rows' ids, with those of the text that comes before them."""
        texts = [tuple(row) for row in rows]
        if not self._before:
            return texts
        share, rest = divmod(len(texts), len(self._before))
        if rest:
            raise ConfigError(
                f"following() was given {len(self._before)} texts, but there are {len(texts)} "
                "rows: give one text, or one for each prompt of the batch"
            )
        for index, ids in enumerate(texts):
            # What starts a text would hide the one before it.
            start = next((i for i, id in enumerate(ids) if id not in self._starts), len(ids))
            texts[index] = self._before[index // share] + ids[start:]
        return texts

    def _prepare(self, rows: Sequence[Sequence[int]], scores: Tensor) -> Fusion:
        positions = [self._context.read(ids) for ids in self._texts(rows)]
        share = self._share(positions, scores)
        if not self.config.aligned:
            return prepare(scores, *self._distributions(positions, scores), self.config, share)
        assert self._aligned is not None
        both = self.config.contrasts
        session = self._session(scores, both=both or share is not None)
        # A half-written word stands there as the tokens that it has so far.
        hidden = session.hidden([position.path for position in positions])
        hidden = hidden if both else hidden[:1]
        return self._aligned.prepare(scores, hidden, self.config, share)

    def _share(self, positions: list[Position], scores: Tensor) -> Tensor | None:
        """``(batch,)`` of the strength that each text calls for, or ``None`` for all of it."""
        whole = self.config.context_kl
        if whole is None:
            return None
        recent = self._session(scores).recent_divergence([one.path for one in positions])
        shares = [min(1.0, nats / whole) for nats in recent]
        return torch.tensor(shares, dtype=torch.float32, device=scores.device)

    def _session(self, scores: Tensor, *, both: bool = True) -> CalibratorSession:
        """The session of a device; of the clean model alone where the rule reads no other."""
        key = self._device or scores.device, both
        session = self._sessions.get(key)
        if session is None:
            calibrator = self.calibrator
            if not both:
                calibrator = copy.copy(calibrator)
                calibrator.reference = None
            session = CalibratorSession(calibrator, device=key[0])
            session = self._sessions.setdefault(key, session)
        return session

    def _distributions(
        self, positions: list[Position], scores: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Clean and reference probabilities and what is mapped, in the columns of ``scores``."""
        width = scores.shape[-1]
        device = self._device or scores.device
        session = self._session(scores)
        wanted: dict[tuple[int, ...], int] = {}
        for position in positions:
            for back in range(len(position.word) + 1):
                wanted.setdefault(position.path[: len(position.path) - back], len(wanted))
        log_probs = session.log_probs(list(wanted))
        covers, weights = weigh_covers(positions, wanted, log_probs)
        mode: Mode = "prefix" if self.config.contrasts else "transfer"
        with plain_mode(device):
            projected = self.vocabulary.project(
                log_probs.exp(), covers, weights, len(positions), mode=mode
            )
        projected = fit(projected, width).to(scores.device)
        mapped = fit(self._mapped.to(scores.device), width)
        return projected[0], projected[1] if len(projected) > 1 else None, mapped
