"""``FusionLogitsProcessor``: one decoding step, from rows of ids to fused scores."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from fusion_detox.alignment.aligned_rule import AlignedTarget
from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.folder import check_rule
from fusion_detox.config import FusionConfig, check_choice
from fusion_detox.decoding.build_decoder import check_calibrator
from fusion_detox.decoding.overlap import Overlap
from fusion_detox.decoding.self_check import find_fault
from fusion_detox.decoding.session import CalibratorSession, Reading, plain_mode
from fusion_detox.decoding.target_columns import TargetColumns
from fusion_detox.decoding.text_context import Covers, Position, RowIds, TextContext
from fusion_detox.errors import ConfigError, DataError, InertError
from fusion_detox.files.models import load_tokenizer
from fusion_detox.fusion import Fusion, fit, prepare_candidates, select
from fusion_detox.vocabulary.map import VocabularyMap
from fusion_detox.vocabulary.token_table import TokenTable, encode
from fusion_detox.vocabulary.words import WORD, WordTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fusion_detox.alignment.alignment import Alignment

logger = logging.getLogger(__name__)

Verify = Literal["raise", "warn", "off"]
Strengths = float | Sequence[float] | Tensor
Rows = Sequence[Sequence[int]] | Sequence[NDArray[np.int64]]

# The settings that can switch fusion off.
_DECISIVE = ("rule", "plausibility", "outside", "clip", "threshold", "floor")


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
        tokenizer: The target's tokenizer, or its folder or hub id.
        config: Fusion settings; by default, those recommended by the calibrator.
        device: Where the calibrator runs; by default on the device of the scores.
        pad_token_id: The target's padding token; by default, the tokenizer's.
        assistant_tokenizer: The tokenizer given to ``generate`` under the same name, if any. Drafts
            in its vocabulary are not fused; the scores by which the target checks them are.
        target: The target itself. Only the aligned rules need it, for its output layer; it is run
            once on a few tokens.
        alignment: How the aligned rules project the calibrator's vectors into the target's space;
            by default the alignment that ``fusion-detox align`` saved for the two.
        verify: What to do if a new processor fails the check of itself: ``"raise"`` an error,
            ``"warn"`` in the log, or ``"off"``, no check. The check runs the same step as
            ``generate`` on the calibrator's probes, in plain text and in the tokenizer's chat
            template: the words to avoid must lose probability against harmless words. If the
            calibrator has no probes, only some token must move. There is no check at strength 0 and
            for the aligned rules. :meth:`with_settings` repeats it for settings that can switch
            fusion off.

    Raises:
        AlignmentError: An aligned rule has no alignment, or one for other models.
        CalibratorError: The calibrator cannot be used.
        ConfigError: A contrast rule or ``context_kl`` needs a reference and the calibrator has
            none, or an aligned rule is used without a target.
        InertError: The check of ``verify`` failed.
        ModelError: A model of the calibrator cannot run with a cache that can be rolled back, or
            the target's hidden states cannot be fused.
        VocabularyError: The two vocabularies cannot be mapped onto each other.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        calibrator: Calibrator | str,
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str],
        config: FusionConfig | None = None,
        *,
        device: torch.device | str | None = None,
        pad_token_id: int | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
        target: PreTrainedModel | None = None,
        alignment: Alignment | None = None,
        verify: Verify = "raise",
    ) -> None:
        check_choice("verify", verify, get_args(Verify))
        if isinstance(calibrator, str):
            calibrator = Calibrator.from_pretrained(calibrator)
        if not isinstance(calibrator, Calibrator):
            raise ConfigError(
                "calibrator must be a Calibrator or the name of one, "
                f"not {type(calibrator).__name__}"
            )
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = load_tokenizer(tokenizer)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(
                "tokenizer must be a tokenizer of transformers or the folder or hub id of one, not "
                f"{type(tokenizer).__name__}. Load it with AutoTokenizer.from_pretrained(...); "
                "wrap a tokenizers.Tokenizer in PreTrainedTokenizerFast(tokenizer_object=...)"
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
        self._read_bytes = tokens.token_bytes if identity else calibrator.tokens.token_bytes
        self._words = WordTokens(calibrator.words, tokens) if calibrator.words else None
        self._on_device: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        self._device = None if device is None else torch.device(device)
        self._sessions: dict[tuple[torch.device, bool], CalibratorSession] = {}
        assistant = 0 if assistant_tokenizer is None else len(assistant_tokenizer)
        self._columns = TargetColumns(self.vocabulary.mapped, assistant)
        self._width: int | None = None  # of the last scores that matched
        self._starts = tokens.reset_ids | {pad_token_id}
        self._before: list[tuple[int, ...]] = []
        self._strengths: list[float] | None = None  # one for each prompt
        self._warned: set[str] = set()  # shared by copies
        self._overlap: Overlap | None = None
        self._verify: Verify = verify
        self._verified = False
        self._check_acts()
        self._context.reset()

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

    def fuse_rows(
        self,
        rows: Rows,
        scores: Tensor,
        strength: Strengths | None = None,
    ) -> Tensor:
        """Fuses one step for rows of any lengths, for engines other than ``generate``.

        Args:
            rows: For each row, all ids of its text so far; padding is not needed. An int64 array of
                numpy is faster to look up than a list if a text is long.
            scores: See ``__call__``.
            strength: The strength, or one for each row; by default, that of the settings. The
                calibrator does not run for rows of strength 0, and their scores stay as they are.

        Returns:
            See ``__call__``.

        Raises:
            ConfigError: A strength is out of range, or their number is not that of the rows.
            DataError: The numbers of rows differ.
            VocabularyError: See ``__call__``.
        """
        strengths = self._strengths_of(len(rows), strength)
        active = self._active(scores, strengths)
        if not active:
            return scores
        fused = self._step(rows, scores, strengths, active).fused()
        return fused if len(active) == len(rows) else _put(scores, active, fused)

    def with_strength(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Fuses one step and also returns how strongly each row was fused.

        Args:
            input_ids: See ``__call__``.
            scores: See ``__call__``.

        Returns:
            What ``__call__`` returns, and ``(batch,)`` float32 strengths: the row's configured
            strength, or less if ``context_kl`` or ``kl_budget`` lowers it.

        Raises:
            DataError: See ``__call__``.
            VocabularyError: See ``__call__``.
        """
        rows = self._rows(input_ids)
        strengths = self._strengths_of(len(rows))
        active = self._active(scores, strengths)
        none = torch.zeros(len(scores), device=scores.device)
        if not active:
            return scores, none
        step = self._step(rows, scores, strengths, active)
        if len(active) == len(rows):
            return step.fused(), step.strength()
        return _put(scores, active, step.fused()), _put(none, active, step.strength())

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

    @property
    def strengths(self) -> tuple[float, ...] | None:
        """The strength of each prompt, if :meth:`with_settings` was given a list of them."""
        return None if self._strengths is None else tuple(self._strengths)

    def with_settings(self, **changes: Any) -> FusionLogitsProcessor:
        """A processor with other settings that shares this one's models and caches.

        With a list of strengths, one batch serves several users. A row is fused as if it were alone
        with its strength. The calibrator does not run for rows of strength 0, and their scores stay
        as they are::

            processor.with_settings(strength=[0, 2.5, 1.0])  # for a batch of three prompts

        Args:
            changes: Settings of :class:`FusionConfig`, such as ``strength=0.5``. ``strength`` may
                also be a sequence or tensor with one value for each prompt of the batch; the rows
                of one prompt (beams, ``num_return_sequences``) are adjacent. ``config.strength`` is
                then the largest.

        Raises:
            ConfigError: A setting is unknown or out of range, or needs a reference model or a
                target that this processor lacks. Or (when called) the number of rows is not a
                multiple of the number of strengths.
            InertError: With these settings, the check of ``verify`` fails.
        """
        result = copy.copy(self)
        if "strength" in changes:
            listed = _plain(changes["strength"])
            result._strengths = listed if isinstance(listed, list) else None
            if isinstance(listed, list):
                if not listed:
                    raise ConfigError(
                        "the list of strengths is empty: pass one strength, or one for each prompt "
                        "of the batch"
                    )
                for each in set(listed):
                    self.config.replace(**{**changes, "strength": each})
                listed = max(listed)
            changes["strength"] = listed
        result.config = self.config.replace(**changes)
        result._check_rule()
        if any(getattr(result.config, name) != getattr(self.config, name) for name in _DECISIVE):
            result._verified = False
        result._check_acts()
        return result

    @contextlib.contextmanager
    def overlap(self, model: PreTrainedModel) -> Iterator[FusionLogitsProcessor]:
        """Within the context, the calibrator reads on another thread while the target runs.

        The calibrator needs only the tokens that the target needs too, so it need not wait for the
        target's scores. Results are the same. It pays off where the target leaves a core free::

            with processor.overlap(model) as overlapped:
                model.generate(**inputs, logits_processor=[overlapped])

        Args:
            model: The target, whose calls are noticed by a forward pre-hook until the context ends.

        Yields:
            A processor like this one, to use within the context.

        Raises:
            ConfigError: The calibrator would run on an accelerator, which runs one model after the
                other: pass ``device="cpu"`` to the processor to run it beside the target. Or the
                rule is aligned.
        """
        device = self._device or model.device
        if device.type != "cpu":
            raise ConfigError(
                f"overlap() runs the calibrator on a CPU thread, but it is on {device}: create the "
                'processor with device="cpu"'
            )
        if self.config.aligned:
            raise ConfigError(
                f"overlap() is not for the rule {self.config.rule!r}: use contrast, product or "
                "mixture"
            )
        result = copy.copy(self)
        result._overlap = Overlap(lambda rows: result._read_ahead(rows, device))
        hook = model.register_forward_pre_hook(result._overlap.before_target, with_kwargs=True)
        try:
            yield result
        finally:
            hook.remove()
            result._overlap.close()
            result._overlap = None

    def reset(self) -> None:
        """Frees the memory of the cache. Results do not depend on it."""
        self._context.reset()
        for session in list(self._sessions.values()):
            session.reset()

    def _step(
        self,
        rows: Rows,
        scores: Tensor,
        strengths: Sequence[float],
        active: Sequence[int],
    ) -> Fusion:
        """Prepares one step: reads the rows, runs the calibrator and projects its output.

        Args:
            rows: See :meth:`fuse_rows`.
            scores: Those of all rows.
            strengths: That of each row.
            active: The rows to fuse; the result holds only these.
        """
        config, scale = self.config, None
        wanted = [strengths[row] for row in active]
        if any(strength != config.strength for strength in wanted):
            config = config.replace(strength=1.0)
            scale = torch.tensor(wanted, dtype=torch.float32, device=scores.device)
        texts = self._texts(rows)
        if self._overlap is not None:
            self._overlap.wait()
            seen = [row for row in texts if isinstance(row, bytes)]
            self._overlap.after_step(seen)
        if len(active) < len(rows):
            texts, scores = [texts[row] for row in active], scores[list(active)]
        device = self._device or scores.device
        if self._aligned is not None and self.config.aligned:
            # No healing here: a partial word keeps its current tokens.
            paths = [self._context.read(ids).path for ids in texts]
            divergence_of = paths if self.config.context_kl is not None else ()
            session = self._session(device)
            reading = session.read(paths, divergence_of=divergence_of, hidden=True)
            hidden = reading.values.rows(range(len(paths)))
            hidden = hidden if self.config.contrasts else hidden[:1]
            context = self._context_factors(reading, scores)
            return self._aligned.prepare(scores, hidden, config, scale, context)
        positions, covers, reading = self._read_texts(texts, device)
        mapped = fit(self._tables(scores.device)[0], scores.shape[-1])
        chosen = select(scores, mapped, config)
        probs = reading.values
        with plain_mode(probs.device):
            gathered = self.vocabulary.gather(
                probs,
                covers.covers,
                covers.weights(probs),
                chosen.places.to(probs.device),
                (len(scores), scores.shape[-1]),
                mode="prefix" if self.config.contrasts else "transfer",
            )
            clean, *reference = gathered[:, chosen.columns.to(gathered.device)].to(scores.device)
        return prepare_candidates(
            scores,
            chosen,
            clean,
            reference[0] if reference else None,
            config,
            scale,
            self._context_factors(reading, scores),
            self._listed_words(positions, chosen.tokens),
        )

    def _listed_words(self, positions: Sequence[Position], tokens: Tensor) -> Tensor | None:
        """``(batch, candidates)`` nats by which to hold back tokens that complete a listed word."""
        listed, factor = self._words, self.config.word_weight
        if listed is None or not factor or not self.config.contrasts:
            return None
        table = self._tables(tokens.device)[1]
        assert table is not None
        unfinished = [self._unfinished(position, listed.longest) for position in positions]
        vocab = table.shape[1]
        known = tokens.clamp_max(vocab - 1)
        begun = torch.tensor([[0 if word else vocab] for word in unfinished], device=tokens.device)
        weights = table.view(-1).take(begun + known)
        for row, word in enumerate(unfinished):
            if completing := listed.completing.get(word):
                ids, nats = (part.to(tokens.device) for part in completing)
                found = torch.where(tokens[row, :, None] == ids, nats, 0.0).amax(-1)
                weights[row] = torch.maximum(weights[row], found)
        return factor * weights

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The mapped tokens and the listed words' weights, copied to a device only once."""
        if device not in self._on_device:
            weights = None if self._words is None else self._words.weights.to(device)
            self._on_device[device] = self.vocabulary.mapped.to(device), weights
        return self._on_device[device]

    def _unfinished(self, position: Position, longest: int) -> bytes:
        """The letters at the end of a text, in lower case; enough of them to know a listed word."""
        end = position.pending
        for id in reversed(position.path):
            if len(end) > longest:
                break
            end = (self._read_bytes[id] or b"") + end
        runs = list(WORD.finditer(end.lower()))
        return runs[-1][0] if runs and runs[-1].end() == len(end) else b""

    def _read_ahead(self, rows: list[bytes], device: torch.device) -> None:
        """Fills the caches with what the next step needs, if these are its rows."""
        if self._before:
            return
        strengths = self._strengths_of(len(rows))
        self._read_texts(
            [row for row, strength in zip(rows, strengths, strict=True) if strength > 0], device
        )

    def _read_texts(
        self, texts: Sequence[RowIds], device: torch.device
    ) -> tuple[list[Position], Covers, Reading]:
        """Where the texts end, how they may go on, and what the calibrator's models say there."""
        positions = [self._context.read(ids) for ids in texts]
        paths = [position.path for position in positions]
        covers = Covers.of(positions)
        divergence_of = paths if self.config.context_kl is not None else ()
        reading = self._session(device).read(covers.prefixes, divergence_of=divergence_of)
        return positions, covers, reading

    def _session(self, device: torch.device) -> CalibratorSession:
        """The session for a device; without the reference model if these settings ignore it."""
        reference = self.config.contrasts or self.config.context_kl is not None
        session = self._sessions.get((device, reference))
        if session is None:
            session = CalibratorSession(self.calibrator, device=device, reference=reference)
            session = self._sessions.setdefault((device, reference), session)
        return session

    def _context_factors(self, reading: Reading, scores: Tensor) -> Tensor | None:
        """``(batch,)`` factors that ``context_kl`` gives, if it is set."""
        full, none = self.config.context_kl, self.config.context_threshold
        if full is None:
            return None
        factors = [min(1.0, max(0.0, nats - none) / (full - none)) for nats in reading.divergence]
        return torch.tensor(factors, dtype=torch.float32, device=scores.device)

    def _strengths_of(self, rows: int, given: Strengths | None = None) -> list[float]:
        """The strength of each row."""
        if given is not None:
            listed = _plain(given)
            if not isinstance(listed, list):
                return [self.config.replace(strength=listed).strength] * rows
            if len(listed) != rows:
                raise ConfigError(
                    f"{len(listed)} strengths were given for {rows} rows: pass one strength, or "
                    "one for each row"
                )
            for each in set(listed):
                self.config.replace(strength=each)
            return listed
        if self._strengths is None:
            return [self.config.strength] * rows
        count = len(self._strengths)
        rows_per_prompt = _rows_per_prompt(
            rows, count, f"the settings have {count} strengths", "strength"
        )
        return [strength for strength in self._strengths for _ in range(rows_per_prompt)]

    def _active(self, scores: Tensor, strengths: Sequence[float]) -> list[int]:
        """The rows to fuse; rejects scores that do not belong to the rows."""
        active = [row for row, strength in enumerate(strengths) if strength > 0]
        if scores.dim() != 2 or len(scores) != len(strengths):
            raise DataError(
                f"{len(strengths)} rows of ids came with scores of shape {tuple(scores.shape)}: "
                "pass scores of shape (batch, vocab) with one row for each row of ids"
            )
        return active if active and self._matches(scores.shape[-1]) else []

    def _matches(self, width: int) -> bool:
        if width == self._width:
            return True
        matches = self._columns.match(width)
        if matches:
            self._width = width
        return matches

    def _rows(self, input_ids: Tensor) -> list[NDArray[np.int64]]:
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
        return list(input_ids.to("cpu", torch.int64).numpy())

    def _texts(self, rows: Rows) -> Sequence[RowIds]:
        """The rows' ids, preceded by the ids of the text that they follow."""
        texts: list[RowIds] = []
        for row in rows:
            if isinstance(row, np.ndarray) and row.dtype == np.int64 and not self._before:
                texts.append(row.tobytes())
                continue
            try:
                texts.append(tuple(row.tolist() if isinstance(row, np.ndarray) else row))
            except TypeError as error:
                raise DataError(
                    "rows must hold one sequence of ids for each row: for a single row, pass [ids]"
                ) from error
        if not self._before:
            return texts
        count = len(self._before)
        rows_per_text = _rows_per_prompt(
            len(texts), count, f"following() was given {count} texts", "text"
        )
        for index, ids in enumerate(texts):
            # A token that starts a text would hide the text before it.
            start = next((i for i, id in enumerate(ids) if id not in self._starts), len(ids))
            texts[index] = (*self._before[index // rows_per_text], *ids[start:])
        return texts

    def _check_acts(self) -> None:
        """The check of ``verify``, if it has not been made with such settings yet."""
        config = self.config
        if self._verify == "off" or self._verified or config.strength == 0 or config.aligned:
            return
        alone = copy.copy(self)
        alone._before, alone._strengths, alone._sessions = [], None, {}
        # The list would hide that the models do nothing.
        alone.config = config.replace(word_weight=0.0)
        device = self._device or self.calibrator.device
        # Other rules are judged on a target like the reference, to which the clean one is compared.
        paired = self.calibrator.reference is not None
        with plain_mode(device):
            fault = find_fault(
                alone.fuse_rows,
                alone._read,
                self._tokenizer,
                self.calibrator.probes if paired else (),
                width=len(self.vocabulary.mapped),
                strength=config.strength,
                device=device,
                target=alone._as_reference if paired and not config.contrasts else None,
            )
        self._verified = True
        if fault is None:
            return
        message = (
            f"with the calibrator {self.calibrator.name or 'unnamed'}, this processor fails "
            f"its check: {fault}. Correct this, or pass verify='warn' or verify='off' if the check "
            "does not fit your calibrator or tokenizer"
        )
        if self._verify == "raise":
            raise InertError(message)
        logger.warning("%s", message)

    def _as_reference(self, rows: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """The reference's log-probs of the tokens that equal scores allow."""
        of_clean, ratio = copy.copy(self), copy.copy(self)
        of_clean.config = FusionConfig(rule="product", strength=1.0, plausibility=0.0)
        ratio.config = FusionConfig(
            "contrast", 1.0, plausibility=0.0, clip=math.inf, word_weight=0.0
        )
        difference = of_clean.fuse_rows(rows, scores) - ratio.fuse_rows(rows, scores)
        return torch.where(scores.isneginf(), scores, difference)

    def _read(self, ids: Sequence[int]) -> bytes:
        """The text that the calibrator reads in a row."""
        position = self._context.read_uncached(tuple(ids))
        return b"".join(self._read_bytes[id] or b"" for id in position.path) + position.pending

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

    def reading(self, ids: Sequence[int]) -> Position:
        """How the calibrator reads the text of a row, up to where its next token begins.

        Args:
            ids: All ids of the row's text so far.

        Returns:
            The calibrator's ids of the text; the bytes of the tokens of its last word, which the
            next token may still extend (token healing); and the bytes of an unfinished character.
        """
        (row,) = self._texts([tuple(ids)])
        assert not isinstance(row, bytes)
        return self._context.read_uncached(row)


class RowwiseProcessor(LogitsProcessor):
    """Applies a processor of its own to each prompt of a batch.

    For example with calibrators for two languages, and none for the third prompt::

        rowwise = RowwiseProcessor([english, german, None])
        model.generate(**inputs, logits_processor=[rowwise])

    The rows of one processor are passed to it in one call. For other strengths of one calibrator,
    :meth:`FusionLogitsProcessor.with_settings` alone is faster.

    Args:
        processors: For each prompt, a processor, or ``None`` for none. The rows of one prompt
            (beams, ``num_return_sequences``) are adjacent.

    Raises:
        ConfigError: The list is empty, or (when called) the number of rows is not a multiple of the
            number of processors.
    """

    supports_continuous_batching = False

    def __init__(self, processors: Sequence[LogitsProcessor | None]) -> None:
        self.processors = tuple(processors)
        if not self.processors:
            raise ConfigError("the list of processors is empty: pass one for each prompt")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Processes one step.

        Args:
            input_ids: ``(batch, length)`` token ids of the target.
            scores: ``(batch, vocab)`` logits or log-probs; not modified.

        Returns:
            ``(batch, vocab)`` scores. Rows without a processor keep theirs.
        """
        rows_per_prompt, rest = divmod(len(scores), len(self.processors))
        if rest or len(input_ids) != len(scores):
            raise ConfigError(
                f"{len(self.processors)} processors were given, but there are {len(input_ids)} "
                f"rows of ids and {len(scores)} of scores: pass one processor for each prompt"
            )
        if len(scores) == 0:
            return scores
        result = scores
        for own in dict.fromkeys(self.processors):
            if own is not None:
                served = enumerate(self.processors)
                rows = [
                    row
                    for number, processor in served
                    if processor is own
                    for row in range(number * rows_per_prompt, (number + 1) * rows_per_prompt)
                ]
                result = _put(result, rows, own(input_ids[rows], scores[rows]))
        return result


def _rows_per_prompt(rows: int, count: int, given: str, noun: str) -> int:
    """How many adjacent rows each of ``count`` prompts has."""
    rows_per_prompt, rest = divmod(rows, count)
    if rest:
        raise ConfigError(
            f"{given}, but there are {rows} rows: pass one {noun}, or one for each prompt of the "
            "batch"
        )
    return rows_per_prompt


def _plain(strength: Strengths) -> float | list[float]:
    """A strength, or a list of strengths, without tensors."""
    values: Any = strength
    if hasattr(strength, "tolist"):
        values = strength.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        return cast("float", values)  # FusionConfig checks it
    for value in values:
        if not isinstance(value, (int, float)):
            raise ConfigError(f"strengths must be numbers, but one is {value!r}")
    return list(values)


def _put(scores: Tensor, rows: Sequence[int], fused: Tensor) -> Tensor:
    """A copy of ``scores`` with some rows replaced."""
    index = torch.tensor(rows, device=scores.device, dtype=torch.long)
    return scores.index_copy(0, index, fused.to(scores.dtype))
