"""``FusionLogitsProcessor``: one decoding step, from rows of ids to fused scores."""

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
from fusion_detox.decoding.build_decoder import check_calibrator
from fusion_detox.decoding.session import CalibratorSession, Reading, plain_mode
from fusion_detox.decoding.target_columns import TargetColumns
from fusion_detox.decoding.text_context import Covers, TextContext
from fusion_detox.errors import ConfigError, DataError
from fusion_detox.fusion import Fusion, fit, prepare
from fusion_detox.vocabulary.map import VocabularyMap
from fusion_detox.vocabulary.token_table import TokenTable, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.alignment.alignment import Alignment

logger = logging.getLogger(__name__)


class FusionLogitsProcessor(LogitsProcessor):
    """Fuses a calibrator into the logits of any target at each step of ``generate()``.

        processor = FusionLogitsProcessor(calibrator, tokenizer)
        model.generate(**inputs, logits_processor=[processor])

    The result is a pure function of ``(input_ids, scores)``; the KV cache inside is only a memo.
    One instance serves any number of calls, batches, beams and threads, and needs no reset.

    ``generate`` runs it before temperature, top-k and top-p and passes it no attention mask, so
    left padding is recognised by ``pad_token_id``. Text that ``generate`` does not pass
    (``inputs_embeds``, an encoder's source, the ids behind ``past_key_values``) can be supplied
    with :meth:`following`. ``generate(cache_implementation="paged")`` drops all logits processors;
    use ``fusion_detox.integrations.continuous_batching`` instead.

    Args:
        calibrator: A ``Calibrator``, or the path, hub id or shipped name of one.
        tokenizer: The target's tokenizer.
        config: Fusion settings; by default, those recommended by the calibrator.
        device: Where the calibrator runs; by default on the device of the scores.
        pad_token_id: The target's padding token; by default, the tokenizer's.
        assistant_tokenizer: The tokenizer given to ``generate`` under the same name, if any. Drafts
            in its vocabulary are not fused; the scores by which the target checks them are.
        target: The target itself. Only the aligned rules need it, for its output layer; it is run
            once on a few tokens.
        alignment: How the aligned rules project the calibrator's vectors into the target's space;
            by default the alignment that ``fusion-detox align`` saved for the two.

    Raises:
        AlignmentError: An aligned rule has no alignment, or one for other models.
        CalibratorError: The calibrator cannot be used.
        ConfigError: A contrast rule or ``context_kl`` needs a reference and the calibrator has
            none, or an aligned rule is used without a target.
        ModelError: A model of the calibrator cannot run with a cache that can be rolled back, or
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
        with plain_mode(calibrator.clean.device):  # other processes load its cached map
            self.vocabulary = VocabularyMap.build(calibrator, tokens, tokenizer)
        identity = self.vocabulary.kind == "identity"
        self._context = TextContext(calibrator, tokens, identity, pad_token_id)
        self._device = None if device is None else torch.device(device)
        self._sessions: dict[tuple[torch.device, bool], CalibratorSession] = {}
        assistant = 0 if assistant_tokenizer is None else len(assistant_tokenizer)
        self._columns = TargetColumns(self.vocabulary.mapped, assistant)
        self._width: int | None = None  # of the last scores that matched
        self._starts = tokens.reset_ids | {pad_token_id}
        self._before: list[tuple[int, ...]] = []
        self._warned: set[str] = set()  # shared by copies

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Fuses one step.

        Args:
            input_ids: ``(batch, length)`` token ids of the target, with or without left padding.
            scores: ``(batch, vocab)`` logits or log-probs; not modified.

        Returns:
            ``(batch, vocab)`` log-probs on the device and in the dtype of ``scores``, or ``scores``
            itself at strength 0.

        Raises:
            DataError: ``input_ids`` is not two-dimensional, or has more or fewer rows than
                ``scores``.
            VocabularyError: The scores are far wider than the tokenizer's vocabulary.
        """
        return self.fuse_rows(self._rows(input_ids), scores)

    def fuse_rows(self, rows: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """Fuses one step for rows of any lengths, for engines other than ``generate``.

        Args:
            rows: For each row, all ids of its text so far; padding is not needed.
            scores: See ``__call__``.

        Returns:
            See ``__call__``.

        Raises:
            DataError: The numbers of rows differ.
            VocabularyError: See ``__call__``.
        """
        if not self._acts_on(scores, len(rows)):
            return scores
        return self._step(rows, scores).fused()

    def with_strength(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Fuses one step and also returns how strongly each row was fused.

        Args:
            input_ids: See ``__call__``.
            scores: See ``__call__``.

        Returns:
            What ``__call__`` returns, and ``(batch,)`` float32 strengths: the configured strength,
            or less if ``context_kl`` or ``kl_budget`` lowers it.

        Raises:
            DataError: See ``__call__``.
            VocabularyError: See ``__call__``.
        """
        rows = self._rows(input_ids)
        if not self._acts_on(scores, len(rows)):
            return scores, torch.zeros(len(scores), device=scores.device)
        step = self._step(rows, scores)
        return step.fused(), step.strength()

    def following(self, text: str | Sequence[str]) -> FusionLogitsProcessor:
        """A processor for rows that continue text that ``generate`` does not pass to it.

        Use it for prompts given only as ``inputs_embeds``, for the source of an encoder-decoder,
        and for the ids behind ``past_key_values`` if only new ids are passed. It shares this
        processor's models and caches.

        Args:
            text: The text before every row, or one text for each prompt of the batch. It is joined
                as it is; end it with a line break if each row begins a new text.

        Raises:
            ConfigError: No text is given, or (when called) the number of rows is not a multiple of
                the number of texts.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ConfigError("following() was given no text: pass one, or one for each prompt")
        result = copy.copy(self)
        result._before = [tuple(ids) for ids in encode(self._tokenizer, texts)]
        return result

    @property
    def alignment(self) -> Alignment | None:
        """The alignment that the aligned rules use; ``None`` for the other rules."""
        return None if self._aligned is None else self._aligned.alignment

    @property
    def prompts_followed(self) -> int:
        """How many texts :meth:`following` was given; 0 if it was not used."""
        return len(self._before)

    def with_settings(self, **changes: Any) -> FusionLogitsProcessor:
        """A processor with other settings that shares this one's models and caches.

        Args:
            changes: Settings of :class:`FusionConfig`, such as ``strength=0.5``.

        Raises:
            ConfigError: A setting is unknown or out of range, or needs a reference model or a
                target that this processor lacks.
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

    def _step(self, rows: Sequence[Sequence[int]], scores: Tensor) -> Fusion:
        """Prepares one step: reads the rows, runs the calibrator and projects its output."""
        positions = [self._context.read(ids) for ids in self._texts(rows)]
        paths = [position.path for position in positions]
        divergence_of = paths if self.config.context_kl is not None else []
        session = self._session(self._device or scores.device)
        if self._aligned is not None and self.config.aligned:
            # No healing here: a partial word keeps its current tokens.
            reading = session.read(paths, divergence_of=divergence_of, hidden=True)
            hidden = reading.values if self.config.contrasts else reading.values[:1]
            strength_scale = self._strength_scale(reading, scores)
            return self._aligned.prepare(scores, hidden, self.config, strength_scale)
        covers = Covers.of(positions)
        reading = session.read(covers.prefixes, divergence_of=divergence_of)
        with plain_mode(reading.values.device):
            projected = self.vocabulary.project(
                reading.values.exp(),
                covers.covers,
                covers.weights(reading.values),
                len(positions),
                mode="prefix" if self.config.contrasts else "transfer",
            )
        clean, *reference = fit(projected, scores.shape[-1]).to(scores.device)
        mapped = fit(self.vocabulary.mapped.to(scores.device), scores.shape[-1])
        return prepare(
            scores,
            clean,
            reference[0] if reference else None,
            mapped,
            self.config,
            self._strength_scale(reading, scores),
        )

    def _session(self, device: torch.device) -> CalibratorSession:
        """The session for a device; without the reference model if these settings ignore it."""
        reference = self.config.contrasts or self.config.context_kl is not None
        session = self._sessions.get((device, reference))
        if session is None:
            session = CalibratorSession(self.calibrator, device=device, reference=reference)
            session = self._sessions.setdefault((device, reference), session)
        return session

    def _strength_scale(self, reading: Reading, scores: Tensor) -> Tensor | None:
        """``(batch,)`` factors of the strength from ``context_kl``, or ``None`` without it."""
        full = self.config.context_kl
        if full is None:
            return None
        scales = [min(1.0, nats / full) for nats in reading.divergence]
        return torch.tensor(scales, dtype=torch.float32, device=scores.device)

    def _acts_on(self, scores: Tensor, rows: int) -> bool:
        """Whether there is anything to fuse; rejects scores that do not belong to the rows."""
        if self.config.strength == 0:
            return False
        if scores.dim() != 2 or len(scores) != rows:
            raise DataError(
                f"{rows} rows of ids came with scores of shape {tuple(scores.shape)}: pass scores "
                "of shape (batch, vocab) with one row for each row of ids"
            )
        return rows > 0 and self._matches(scores.shape[-1])

    def _matches(self, width: int) -> bool:
        if width == self._width:
            return True
        matches = self._columns.match(width)
        if matches:
            self._width = width
        return matches

    def _rows(self, input_ids: Tensor) -> list[list[int]]:
        if input_ids.dim() != 2:
            raise DataError(
                f"input_ids have shape {tuple(input_ids.shape)}, but must be (batch, length): for "
                "a single row, pass input_ids[None]"
            )
        if input_ids.shape[-1] == 0 and not self._before and not self._warned:
            self._warned.add("no ids")
            logger.warning(
                "input_ids are empty, as with inputs_embeds alone, so the prompt cannot be read "
                "and the calibrator sees only what is generated from here on. Pass input_ids with "
                "inputs_embeds, or use processor.following(text)"
            )
        rows: list[list[int]] = input_ids.tolist()
        return rows

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The rows' ids, preceded by the ids of the text that they follow."""
        texts = [tuple(row) for row in rows]
        if not self._before:
            return texts
        rows_per_text, rest = divmod(len(texts), len(self._before))
        if rest:
            raise ConfigError(
                f"following() was given {len(self._before)} texts, but there are {len(texts)} "
                "rows: pass one text, or one for each prompt of the batch"
            )
        for index, ids in enumerate(texts):
            # A token that starts a text would hide the text before it.
            start = next((i for i, id in enumerate(ids) if id not in self._starts), len(ids))
            texts[index] = self._before[index // rows_per_text] + ids[start:]
        return texts

    def _check_rule(self) -> None:
        check_rule(self.config, self.calibrator.reference is not None)
        if not self.config.aligned:
            return
        if self._aligned is None:
            raise ConfigError(
                f"the rule {self.config.rule!r} works on the target's output layer: pass the model "
                f"that generates, FusionLogitsProcessor(..., FusionConfig(rule="
                f"{self.config.rule!r}), target=model)"
            )
        self._aligned.check_rule(self.config)
