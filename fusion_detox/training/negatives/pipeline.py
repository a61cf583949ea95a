"""From sentences to a file of paraphrase sets: asks, keeps every answer, filters."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusion_detox.errors import ConfigError, DataError, DataFileError, EndpointError
from fusion_detox.files.atomic import write_whole
from fusion_detox.files.journal import append_row
from fusion_detox.scoring.cache import CachedScorer
from fusion_detox.training.data.pairs import fold
from fusion_detox.training.negatives.answer_file import AnswerFolder
from fusion_detox.training.negatives.config import (
    NEGATIVE,
    POSITIVE,
    NegativesConfig,
    PromptTexts,
)
from fusion_detox.training.negatives.cost import Estimate, Prices, estimate
from fusion_detox.training.negatives.filters import Filters
from fusion_detox.training.negatives.judges import Judges, load_judges
from fusion_detox.training.negatives.local import LocalWriter
from fusion_detox.training.negatives.report import NegativesReport, make_report
from fusion_detox.training.negatives.requests import Answer, Request, Writer, requests_for

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told ``(what, done, total)`` as the work goes on."""

ASKING, FILTERING = "asking", "filtering"
_BLOCK = 32


def make_negatives(
    sentences: Sequence[str] | None,
    out: str | Path,
    *,
    writer: Writer | str | None = None,
    config: NegativesConfig | None = None,
    prompts: PromptTexts | None = None,
    judges: Judges | None = None,
    prices: Prices | None = None,
    confirm: Callable[[Estimate], bool] | None = None,
    refilter: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> NegativesReport:
    """Asks a language model for toxic and neutral paraphrases and keeps those that pass filters.

    The hard negatives of arXiv 2401.08491. Every answer is on the disk, in the folder ``OUT.work``,
    before the next one is asked for; the same call goes on where a run ended for whatever reason.
    ``out`` is written as a whole at the end, in the order of the sentences, and is the same
    whatever happened in between.

    Args:
        sentences: What to paraphrase, each once; with ``refilter`` and ``None`` those of before.
        out: File of ``ParaphraseSet`` rows for ``read_pairs``.
        writer: An ``EndpointWriter``, a ``LocalWriter``, or a local model's folder or hub id; not
            needed to ``refilter``.
        config: How much to ask for, how to sample, and the filters' thresholds.
        prompts: What to ask; the paper's words by default.
        judges: What the filters judge with.
        prices: For the estimate and the report.
        confirm: Shown what is about to be asked; if it says no, nothing is asked or written.
        refilter: Ask nothing; filter the answers of before again.
        overwrite: Throw away the answers of before.
        progress: Told how far the work is.

    Returns:
        What was asked, kept and dropped. If the endpoint died half-way, ``stopped`` says so, and
        the sets of the answers until then are in ``out``.

    Raises:
        DataError: There is no sentence, one is empty, or the folder holds answers that were asked
            for with other settings.
        DataFileError: A file cannot be read or written.
        ConfigError: No writer is given, or a setting of it is wrong.
        EndpointError: The endpoint refuses or does not answer, and there is no answer at all.
        ModelNotFoundError: A model is not here and cannot be downloaded.
        ModelError: A model cannot be used.
        MissingExtraError: A package for a filter is not installed.
    """
    run = _Run(Path(out), config or NegativesConfig(), prompts or PromptTexts(), prices or Prices())
    if refilter:
        if overwrite:
            raise ConfigError("refilter needs the answers that overwrite would throw away")
        run.take_up(sentences)
        with run.folder.locked():
            return run.filter(judges or Judges(), progress)
    if writer is None:
        raise ConfigError("a model or an endpoint is needed to ask for paraphrases")
    if isinstance(writer, str):
        writer = LocalWriter(writer)
    run.plan(_checked(sentences), writer)
    run.folder.check(run.settings, overwrite=overwrite)
    planned = estimate(run.folder.missing(run.requests), writer, run.config, run.prices)
    if confirm is not None and not confirm(planned):
        return run.report(planned=planned)
    with run.folder.locked():
        run.folder.check(run.settings, overwrite=overwrite)  # another run may have added to it
        run.folder.begin(run.settings)
        stopped = run.ask(writer, progress)
        return run.filter(judges or Judges(), progress, planned=planned, stopped=stopped)


class _Run:
    """What the steps share."""

    def __init__(
        self, out: Path, config: NegativesConfig, prompts: PromptTexts, prices: Prices
    ) -> None:
        self.folder = AnswerFolder(out)
        self.config, self.prompts, self.prices = config, prompts, prices
        self.sentences: list[str] = []
        self.requests: list[Request] = []
        self.settings: dict[str, Any] = {}

    def plan(self, sentences: list[str], writer: Writer) -> None:
        """Sets what is to be asked."""
        counts = {"positives": self.config.positives, "negatives": self.config.negatives}
        sides = {POSITIVE: "positives", NEGATIVE: "negatives"}
        self.sentences = sentences
        self.requests = requests_for(sentences, self.config, self.prompts)
        self.settings = {
            "asking": {
                "writer": writer.record(),
                "prompts": dataclasses.asdict(self.prompts),
                "sampling": self.config.asking(),
                # A list of five differs from a list of eight; single answers do not.
                "in_one_request": {
                    side: counts[name] for side, name in sides.items() if self.prompts.in_one(side)
                },
            },
            "counts": counts,
            "sentences": sentences,
        }

    def take_up(self, sentences: Sequence[str] | None) -> None:
        """Sets what was asked before, for the filters alone."""
        self.settings = before = self.folder.settings()
        try:
            asking, counts = before["asking"], before["counts"]
            self.prompts = PromptTexts(**asking["prompts"])
            self.config = dataclasses.replace(self.config, **asking["sampling"], **counts)
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{self.folder.folder} was written by another version of this library: {error}"
            ) from error
        self.sentences = _checked(before["sentences"] if sentences is None else sentences)
        self.requests = requests_for(self.sentences, self.config, self.prompts)
        self.folder.read()

    def ask(self, writer: Writer, progress: Progress | None) -> str:
        """Asks what is missing; why it ended early, if the endpoint died after some answers."""
        missing, done = self.folder.missing(self.requests), 0
        if not missing:
            return ""
        with self.folder.appending() as append:

            def keep(answer: Answer) -> None:
                nonlocal done
                append(answer)
                done += 1
                if progress:
                    progress(ASKING, done, len(missing))

            if progress:
                progress(ASKING, 0, len(missing))
            try:
                writer.answer(missing, self.config, self.prompts, keep)
            except EndpointError as error:
                if len(self.folder.missing(self.requests)) == len(self.requests):
                    raise
                logger.info("%s", error)  # the report tells it
                return str(error)
        return ""

    def filter(
        self,
        judges: Judges,
        progress: Progress | None,
        *,
        planned: Estimate | None = None,
        stopped: str = "",
    ) -> NegativesReport:
        """Judges all answers and writes the output."""
        grouped: dict[str, list[Answer]] = {sentence: [] for sentence in self.sentences}
        for answer in self.folder.answers(self.requests):
            if answer is not None and not answer.failure:
                grouped[answer.request.sentence].append(answer)
        answered = {sentence: found for sentence, found in grouped.items() if found}
        filters, provenance = self._filters(judges)
        stream, pairs = io.BytesIO(), 0
        names = list(answered)
        for start in range(0, len(names), _BLOCK):
            block = {name: answered[name] for name in names[start : start + _BLOCK]}
            for made in filters.judge(block, provenance):
                append_row(stream, made.to_row(), errors="surrogatepass")
                pairs += 1
            if progress:
                progress(FILTERING, start + len(block), len(names))
        try:
            write_whole(self.folder.out, stream.getvalue())
        except OSError as error:
            raise DataFileError(f"cannot write {self.folder.out}: {error.strerror}") from error
        unanswered = len(grouped) - len(answered)
        return self.report(filters, pairs, unanswered, planned=planned, stopped=stopped)

    def report(
        self,
        filters: Filters | None = None,
        pairs: int = 0,
        unanswered: int = 0,
        *,
        planned: Estimate | None = None,
        stopped: str = "",
    ) -> NegativesReport:
        """Where things stand."""
        return make_report(
            (str(self.folder.out), str(self.folder.answers_path)),
            self.requests,
            self.folder.answers(self.requests),
            filters=filters,
            unanswered=unanswered,
            pairs=pairs,
            prices=self.prices,
            planned=planned,
            stopped=stopped,
        )

    def _filters(self, judges: Judges) -> tuple[Filters, dict[str, Any]]:
        """The filters, and what each set says of its origin."""
        scorer, embed, per_byte = load_judges(judges, self.config)
        cached = CachedScorer(scorer, self.folder.folder / "scores.jsonl")
        asking = self.settings["asking"]
        provenance = {
            **{name: asking[name] for name in ("writer", "prompts", "sampling")},
            "filters": {
                **self.config.keeping(),
                "scorer": _identity(scorer),
                "similarity": _identity(embed),
                "closeness": _identity(per_byte),
            },
        }
        return Filters(self.config, cached, embed=embed, per_byte=per_byte), provenance


def _checked(sentences: object) -> list[str]:
    """Each sentence once, white space around it removed."""
    if not isinstance(sentences, (list, tuple)):
        raise DataError(f"sentences must be a list of texts, but is {sentences!r:.60}")
    found: dict[str, str] = {}
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, str) or not sentence.strip():
            raise DataError(
                f"sentence {number} is {sentence!r:.60}; give it some text or leave it out"
            )
        try:
            sentence.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"sentence {number} is not valid Unicode text (character {error.start}: "
                f"{sentence[error.start]!r}); give it in UTF-8"
            ) from error
        found.setdefault(fold(sentence).casefold(), sentence.strip())
    if not found:
        raise DataError("there are no sentences to paraphrase")
    if len(found) < len(sentences):
        logger.info("%d sentences occur more than once", len(sentences) - len(found))
    return list(found.values())


def _identity(judge: Any) -> Any:
    """What tells a judge from others, JSON-ready; ``None`` where there is none."""
    if judge is None:
        return None
    record = judge.record() if hasattr(judge, "record") else {}
    named = {"name": getattr(judge, "name", None), **record}
    kept = ("name", "model", "commit", "weights")
    return {name: named[name] for name in kept if named.get(name)} or type(judge).__name__
