"""Which answers become pairs: refusals, length, meaning, toxicity, probability, duplicates."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fusion_detox.scoring.base import NoTextScoredError, Scorer
from fusion_detox.training.data.pairs import ParaphraseSet, fold
from fusion_detox.training.negatives.answers import parse_answer
from fusion_detox.training.negatives.config import NEGATIVE, POSITIVE, SIDES, NegativesConfig
from fusion_detox.training.negatives.near_duplicates import NearDuplicates
from fusion_detox.training.negatives.requests import Answer

Embed = Callable[[Sequence[str]], Any]
"""Texts to unit vectors ``(texts, width)``; an ``Embedder`` with ``unit_norm`` is one."""

PerByte = Callable[[Sequence[str]], Sequence[float]]
"""Texts to their negative log-likelihood in nats a byte; nan where there is none."""

ECHO, LENGTH_RATIO, MEANING, UNSCORED = "the sentence itself", "length", "similarity", "not scored"
TOXICITY, CLOSENESS = "toxicity", "closeness"
DUPLICATE, NEAR = "duplicate", "near-duplicate"
FEW_POSITIVES, FEW_NEGATIVES = "too few positives", "too few negatives"


@dataclasses.dataclass
class _Judged:
    """One text with its scores; nan where unknown, ``None`` where not asked for."""

    text: str
    toxicity: float = math.nan
    similarity: float | None = None
    nats_a_byte: float | None = None

    def scores(self) -> dict[str, float]:
        named = {
            "toxicity": self.toxicity,
            "similarity": self.similarity,
            "nats_per_byte": self.nats_a_byte,
        }
        return {k: round(v, 4) for k, v in named.items() if v is not None and math.isfinite(v)}


class Filters:
    """Judges answers sentence by sentence, and counts what is dropped and why.

    Each text counts for the first filter that it fails, in the order of this module's title.
    Duplicates are looked for on each side over all sentences, the first one stays; a negative may
    be close to its sentence in wording, for that makes it hard.

    Args:
        config: The thresholds.
        scorer: Toxicity.
        embed: Meaning; ``None`` for no such filter.
        per_byte: Probability; ``None`` for no such filter.
    """

    def __init__(
        self,
        config: NegativesConfig,
        scorer: Scorer,
        *,
        embed: Embed | None = None,
        per_byte: PerByte | None = None,
    ) -> None:
        self._config, self._scorer = config, scorer
        self._embed = embed if config.min_similarity is not None else None
        self._per_byte = per_byte if config.max_closeness is not None else None
        self._seen = {side: NearDuplicates(config.near_duplicate) for side in SIDES}
        self.dropped: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
        self.without_pair: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()

    def judge(
        self, block: Mapping[str, Sequence[Answer]], provenance: Mapping[str, Any]
    ) -> list[ParaphraseSet]:
        """The paraphrase sets of some sentences, each with its answers.

        Raises:
            ScoringError: The scorer cannot go on.
        """
        found = {sentence: self._candidates(sentence, block[sentence]) for sentence in block}
        judged = self._score(found)
        sets = []
        for sentence, sides in found.items():
            anchor = judged[sentence, sentence]
            kept = self._keep(anchor, sides, judged)
            if made := self._set(anchor, kept, provenance):
                sets.append(made)
        return sets

    def _candidates(self, sentence: str, answers: Iterable[Answer]) -> dict[str, list[str]]:
        """The paraphrases of each side, before anything is scored."""
        sides: dict[str, list[str]] = {side: [] for side in SIDES}
        for answer in answers:
            if answer.failure:
                continue
            side = answer.request.side
            texts, reason = parse_answer(
                answer.text, sentence=sentence, wanted=answer.request.wanted, finish=answer.finish
            )
            if reason:
                self.dropped[side][reason] += 1
            for text in texts:
                if fold(text).casefold() == fold(sentence).casefold():
                    self.dropped[side][ECHO] += 1
                elif not self._fits(text, sentence):
                    self.dropped[side][LENGTH_RATIO] += 1
                else:
                    sides[side].append(text)
        return sides

    def _fits(self, text: str, sentence: str) -> bool:
        most = self._config.max_length_ratio
        ratio = len(fold(text)) / len(fold(sentence))
        return most is None or 1 / most <= ratio <= most

    def _score(self, found: Mapping[str, Mapping[str, list[str]]]) -> dict[Any, _Judged]:
        """Scores of each sentence and of each of its paraphrases, every model called once."""
        keys = dict.fromkeys(
            (sentence, text)
            for sentence, sides in found.items()
            for text in (sentence, *sides[POSITIVE], *sides[NEGATIVE])
        )
        texts = list(dict.fromkeys(text for _, text in keys))
        try:
            toxicity = dict(zip(texts, self._scorer.score(texts), strict=True))
        except NoTextScoredError:  # a block may be small; the texts count as not scored
            toxicity = {}
        judged = {key: _Judged(key[1], toxicity.get(key[1], math.nan)) for key in keys}
        if self._embed is not None and texts:
            vectors = np.asarray(self._embed(texts), dtype=np.float64)
            rows = {text: vectors[row] for row, text in enumerate(texts)}
            for (sentence, text), one in judged.items():
                one.similarity = float(rows[sentence] @ rows[text])
        if self._per_byte is not None and texts:
            nats = dict(zip(texts, self._per_byte(texts), strict=True))
            for (_, text), one in judged.items():
                one.nats_a_byte = nats[text]
        return judged

    def _keep(
        self, anchor: _Judged, sides: Mapping[str, Sequence[str]], judged: Mapping[Any, _Judged]
    ) -> dict[str, list[_Judged]]:
        kept: dict[str, list[_Judged]] = {side: [] for side in SIDES}
        if anchor.toxicity <= self._config.clean_to:
            kept[POSITIVE].append(anchor)
        for side in SIDES:
            own = NearDuplicates(self._config.near_duplicate)
            for one in kept[POSITIVE] if side == POSITIVE else ():
                own.add(one.text)
            for text in sides[side]:
                one = judged[anchor.text, text]
                reason = self._reason(side, one, anchor) or _repeats(
                    one.text, own, self._seen[side]
                )
                if not reason and side == NEGATIVE:
                    twin = any(fold(text) == fold(other.text) for other in kept[POSITIVE])
                    reason = DUPLICATE if twin else ""
                if reason:
                    self.dropped[side][reason] += 1
                else:
                    own.add(text)
                    kept[side].append(one)
        return kept

    def _reason(self, side: str, one: _Judged, anchor: _Judged) -> str:
        """Why a paraphrase is dropped; empty where it is kept."""
        config, near = self._config, one.nats_a_byte
        least = config.min_similarity
        if one.similarity is not None and least is not None and not one.similarity >= least:
            return MEANING
        if math.isnan(one.toxicity):
            return UNSCORED
        if side == NEGATIVE and one.toxicity < config.toxic_from:
            return TOXICITY
        if side == POSITIVE and one.toxicity > config.clean_to:
            return TOXICITY
        if near is not None and config.max_closeness is not None:
            distance = abs(near - (anchor.nats_a_byte or 0.0))
            if not distance <= config.max_closeness:
                return CLOSENESS
        return ""

    def _set(
        self,
        anchor: _Judged,
        kept: Mapping[str, Sequence[_Judged]],
        provenance: Mapping[str, Any],
    ) -> ParaphraseSet | None:
        for side, least, reason in (
            (POSITIVE, self._config.min_positives, FEW_POSITIVES),
            (NEGATIVE, self._config.min_negatives, FEW_NEGATIVES),
        ):
            if len(kept[side]) < least:
                self.without_pair[reason] += 1
                return None
        for side in SIDES:
            self.kept[side] += len(kept[side])
            for one in kept[side]:
                self._seen[side].add(one.text)
        scores: dict[str, Any] = {"anchor": anchor.scores()}
        for name, side in (("positives", POSITIVE), ("negatives", NEGATIVE)):
            scores[name] = [one.scores() for one in kept[side]]
        return ParaphraseSet(
            anchor.text,
            tuple(one.text for one in kept[POSITIVE]),
            tuple(one.text for one in kept[NEGATIVE]),
            "",
            {**provenance, "scores": scores},
        )


def _repeats(text: str, *known: NearDuplicates) -> str:
    """Why a text says nothing new; empty where it does."""
    if any(texts.equal(text) for texts in known):
        return DUPLICATE
    return NEAR if any(texts.near(text) for texts in known) else ""
