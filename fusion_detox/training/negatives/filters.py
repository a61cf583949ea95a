"""Decides which answers become paraphrase sets.

The filters, in this order: refusals, length, meaning, toxicity, likelihood, duplicates.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusion_detox.scoring.base import NoTextScoredError, Scorer
from fusion_detox.training.data.pairs import ParaphraseSet, fold
from fusion_detox.training.negatives.answers import parse_answer
from fusion_detox.training.negatives.config import NEGATIVE, POSITIVE, SIDES, NegativesConfig
from fusion_detox.training.negatives.judges import Embed, NllPerByte
from fusion_detox.training.negatives.requests import Answer

ECHO, LENGTH_RATIO, MEANING, UNSCORED = "the sentence itself", "length", "similarity", "not scored"
TOXICITY, NLL_GAP, DUPLICATE = "toxicity", "closeness", "duplicate"
FEW_POSITIVES, FEW_NEGATIVES = "too few positives", "too few negatives"
NO_ANSWER = "no answer"


@dataclasses.dataclass
class _Candidate:
    """A sentence or paraphrase with its scores; nan if unknown, ``None`` if not needed."""

    text: str
    toxicity: float = math.nan
    similarity: float | None = None
    nll_per_byte: float | None = None

    def scores(self) -> dict[str, float]:
        named = {
            "toxicity": self.toxicity,
            "similarity": self.similarity,
            "nats_per_byte": self.nll_per_byte,
        }
        return {k: round(v, 4) for k, v in named.items() if v is not None and math.isfinite(v)}


_Sides = dict[str, list[_Candidate]]


class Filters:
    """Turns answers into paraphrase sets, and counts what is dropped and why.

    A paraphrase is counted under the first filter that it fails. A duplicate equals an earlier text
    of its side, in any set, apart from case and punctuation. A negative may share nearly all its
    words with its sentence; such a negative is hard.

    Args:
        config: The thresholds.
        scorer: Toxicity.
        embed: Meaning; ``None`` disables this filter.
        nll_per_byte: Likelihood; ``None`` disables this filter.
    """

    def __init__(
        self,
        config: NegativesConfig,
        scorer: Scorer,
        embed: Embed | None = None,
        nll_per_byte: NllPerByte | None = None,
    ) -> None:
        self._config, self._scorer = config, scorer
        self._embed, self._nll_per_byte = embed, nll_per_byte
        self._seen: dict[str, set[str]] = {side: set() for side in SIDES}
        self.dropped: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
        self.without_pair: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.pair_count = 0

    def pairs(
        self, block: Mapping[str, Sequence[Answer]], provenance: Mapping[str, Any]
    ) -> list[ParaphraseSet]:
        """The paraphrase sets of some sentences, given the answers for each.

        Raises:
            ScoringError: The scorer cannot continue.
        """
        found = [
            (_Candidate(sentence), self._candidates(sentence, answers))
            for sentence, answers in block.items()
            if answers
        ]
        if found:
            self._score(found)
        if unanswered := len(block) - len(found):
            self.without_pair[NO_ANSWER] += unanswered
        sets = []
        for anchor, sides in found:
            kept = self._keep(anchor, sides)
            if len(kept[POSITIVE]) < self._config.min_positives:
                self.without_pair[FEW_POSITIVES] += 1
            elif len(kept[NEGATIVE]) < self._config.min_negatives:
                self.without_pair[FEW_NEGATIVES] += 1
            else:
                sets.append(self._set(anchor, kept, provenance))
        return sets

    def _candidates(self, sentence: str, answers: Sequence[Answer]) -> _Sides:
        """The paraphrases of each side, before anything is scored."""
        sides: _Sides = {side: [] for side in SIDES}
        for answer in answers:
            side, wanted = answer.request.side, answer.request.wanted
            texts, reason = parse_answer(
                answer.text, sentence=sentence, wanted=wanted, finish=answer.finish
            )
            if reason:
                self.dropped[side][reason] += 1
            for text in texts:
                ratio, limit = len(fold(text)) / len(fold(sentence)), self._config.max_length_ratio
                if fold(text).casefold() == fold(sentence).casefold():
                    self.dropped[side][ECHO] += 1
                elif limit is not None and not 1 / limit <= ratio <= limit:
                    self.dropped[side][LENGTH_RATIO] += 1
                else:
                    sides[side].append(_Candidate(text))
        return sides

    def _score(self, found: Sequence[tuple[_Candidate, _Sides]]) -> None:
        """Scores each sentence and its paraphrases; calls every model once."""
        groups = [(anchor, *sides[POSITIVE], *sides[NEGATIVE]) for anchor, sides in found]
        texts = list(dict.fromkeys(one.text for group in groups for one in group))
        row = {text: k for k, text in enumerate(texts)}
        try:
            toxicity = self._scorer.score(texts)
        except NoTextScoredError:  # possible in a small block; the texts count as not scored
            toxicity = [math.nan] * len(texts)
        vectors = None if self._embed is None else np.asarray(self._embed(texts), dtype=np.float64)
        nlls = None if self._nll_per_byte is None else self._nll_per_byte(texts)
        for anchor, *others in groups:
            for one in (anchor, *others):
                one.toxicity = toxicity[row[one.text]]
                if vectors is not None:
                    one.similarity = float(vectors[row[anchor.text]] @ vectors[row[one.text]])
                if nlls is not None:
                    one.nll_per_byte = nlls[row[one.text]]

    def _keep(self, anchor: _Candidate, sides: _Sides) -> _Sides:
        kept: _Sides = {side: [] for side in SIDES}
        if anchor.toxicity <= self._config.clean_to:
            kept[POSITIVE].append(anchor)
        for side in SIDES:
            own = {normalised(one.text) for one in kept[side]}
            other_side = {fold(one.text) for one in kept[POSITIVE]} if side == NEGATIVE else set()
            for one in sides[side]:
                name = normalised(one.text)
                reason = self._reason(side, one, anchor)
                if not reason and (
                    name in own or name in self._seen[side] or fold(one.text) in other_side
                ):
                    reason = DUPLICATE
                if reason:
                    self.dropped[side][reason] += 1
                else:
                    own.add(name)
                    kept[side].append(one)
        return kept

    def _reason(self, side: str, one: _Candidate, anchor: _Candidate) -> str:
        """Why a paraphrase's scores exclude it; empty if they do not. nan fails a filter."""
        config, similarity, nll = self._config, one.similarity, one.nll_per_byte
        minimum, max_gap = config.min_similarity, config.max_nll_gap
        if similarity is not None and minimum is not None and not similarity >= minimum:
            return MEANING
        if math.isnan(one.toxicity):
            return UNSCORED
        if side == NEGATIVE and one.toxicity < config.toxic_from:
            return TOXICITY
        if side == POSITIVE and one.toxicity > config.clean_to:
            return TOXICITY
        if nll is not None and anchor.nll_per_byte is not None and max_gap is not None:
            return "" if abs(nll - anchor.nll_per_byte) <= max_gap else NLL_GAP
        return ""

    def _set(
        self, anchor: _Candidate, kept: _Sides, provenance: Mapping[str, Any]
    ) -> ParaphraseSet:
        self.pair_count += 1
        for side in SIDES:
            self.kept[side] += len(kept[side])
            self._seen[side].update(normalised(one.text) for one in kept[side])
        scores = {
            "anchor": anchor.scores(),
            "positives": [one.scores() for one in kept[POSITIVE]],
            "negatives": [one.scores() for one in kept[NEGATIVE]],
        }
        return ParaphraseSet(
            anchor.text,
            tuple(one.text for one in kept[POSITIVE]),
            tuple(one.text for one in kept[NEGATIVE]),
            provenance={**provenance, "scores": scores},
        )


def normalised(text: str) -> str:
    """The text in lower case, without punctuation, with single spaces."""
    return " ".join(re.findall(r"\w+", text.casefold())) or " ".join(text.split())
