"""Entry point of hard-negative generation: requests answers, stores them, filters them."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections import Counter
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
from fusion_detox.training.negatives.filters import Filters
from fusion_detox.training.negatives.judges import Judges
from fusion_detox.training.negatives.local import LocalWriter
from fusion_detox.training.negatives.report import Estimate, NegativesReport, Prices, estimate
from fusion_detox.training.negatives.requests import Answer, Request, Writer, requests_for

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the stage, the number of items done, and the total."""

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
    """Asks a language model for toxic and neutral paraphrases, and keeps those that pass filters.

    These are the hard negatives of arXiv 2401.08491, section 3.3. Each answer is stored in the
    folder ``OUT.work`` as soon as it arrives; after an interruption, the same call resumes. ``out``
    is written in one go at the end, in the order of the sentences. It does not depend on
    interruptions.

    Args:
        sentences: The sentences to paraphrase; repetitions are ignored. With ``refilter``,
            ``None`` means those of the earlier run.
        out: File of ``ParaphraseSet`` rows for ``read_pairs``.
        writer: An ``EndpointWriter``, a ``LocalWriter``, or a local model's folder or hub id; not
            needed with ``refilter``.
        config: How many paraphrases to request, how to sample, and the filters' thresholds.
        prompts: The prompts; by default those of the paper.
        judges: The models behind the filters.
        prices: For the estimate and the report.
        confirm: Called with the estimated cost; if it returns false, nothing is sent or written.
        refilter: Filter the stored answers again and send no requests.
        overwrite: Delete the stored answers.
        progress: Called as the work proceeds.

    Returns:
        What was requested, kept and dropped. If the endpoint failed partway, ``stopped`` states
        the reason, and ``out`` contains the sets of the answers received by then.

    Raises:
        DataError: There are no sentences, one is empty, or the folder contains answers that were
            requested with other settings.
        DataFileError: A file cannot be read or written.
        ConfigError: The writer is missing, or one of its settings is wrong.
        EndpointError: The endpoint refuses requests or does not answer, and no answer is stored.
        ModelNotFoundError: A model was not found and cannot be downloaded.
        ModelError: A model cannot be used.
        MissingExtraError: A package for a filter is not installed.
    """
    judges, prices = judges or Judges(), prices or Prices()
    run = _Run(Path(out), config or NegativesConfig(), prompts or PromptTexts(), prices, progress)
    if refilter:
        if overwrite:
            raise ConfigError("refilter needs the stored answers, which overwrite would delete")
        run.restore(sentences)
        with run.folder.locked():
            return run.filter(judges)
    if writer is None:
        raise ConfigError("a model or an endpoint is required to request paraphrases")
    if isinstance(writer, str):
        writer = LocalWriter(writer)
    run.plan(_checked(sentences), writer)
    run.folder.check(run.settings, overwrite=overwrite)
    run.planned = estimate(run.folder.missing(run.requests), writer, run.config, prices)
    if confirm is not None and not confirm(run.planned):
        return run.report()
    with run.folder.locked():
        run.folder.check(run.settings, overwrite=overwrite)  # another run may have changed it
        run.folder.begin(run.settings)
        run.ask(writer)
        return run.filter(judges)


class _Run:
    """The state that the steps share."""

    def __init__(
        self,
        out: Path,
        config: NegativesConfig,
        prompts: PromptTexts,
        prices: Prices,
        progress: Progress | None,
    ) -> None:
        self.folder = AnswerFolder(out)
        self.config, self.prompts, self.prices = config, prompts, prices
        self.sentences: list[str] = []
        self.requests: list[Request] = []
        self.settings: dict[str, Any] = {}
        self.planned: Estimate | None = None
        self.stopped = ""
        self._show = progress or (lambda stage, done, total: None)

    def plan(self, sentences: list[str], writer: Writer) -> None:
        """Sets the requests of a new or resumed run."""
        counts = {POSITIVE: self.config.positives, NEGATIVE: self.config.negatives}
        self.sentences = sentences
        self.requests = requests_for(sentences, self.config, self.prompts)
        self.settings = {
            "asking": {
                "writer": writer.record(),
                "prompts": dataclasses.asdict(self.prompts),
                "sampling": self.config.sampling(),
                # The number of paraphrases influences an answer only if it is in the prompt.
                "in_one_request": {
                    side: n for side, n in counts.items() if self.prompts.asks_for_list(side)
                },
            },
            "counts": {"positives": counts[POSITIVE], "negatives": counts[NEGATIVE]},
            "sentences": sentences,
        }

    def restore(self, sentences: Sequence[str] | None) -> None:
        """Sets the requests of an earlier run, in order to filter its answers again."""
        self.settings = stored = self.folder.settings()
        try:
            asking, counts = stored["asking"], stored["counts"]
            self.prompts = PromptTexts(**asking["prompts"])
            self.config = dataclasses.replace(self.config, **asking["sampling"], **counts)
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{self.folder.folder} was written by another version of this library ({error}); "
                "use that version, or choose another output"
            ) from error
        self.sentences = _checked(stored["sentences"] if sentences is None else sentences)
        self.requests = requests_for(self.sentences, self.config, self.prompts)
        self.folder.read()

    def ask(self, writer: Writer) -> None:
        """Sends the missing requests; sets ``stopped`` if the endpoint fails after some answers."""
        missing, done = self.folder.missing(self.requests), 0
        if not missing:
            return
        with self.folder.appending() as append:

            def keep(answer: Answer) -> None:
                nonlocal done
                append(answer)
                done += 1
                self._show(ASKING, done, len(missing))

            self._show(ASKING, 0, len(missing))
            try:
                writer.answer(missing, self.config, self.prompts, keep)
            except EndpointError as error:
                if len(self.folder.missing(self.requests)) == len(self.requests):
                    raise
                self.stopped = str(error)

    def filter(self, judges: Judges) -> NegativesReport:
        """Filters all answers and writes the output."""
        answers: dict[str, list[Answer]] = {sentence: [] for sentence in self.sentences}
        for answer in self.folder.answers(self.requests):
            if not answer.failure:
                answers[answer.request.sentence].append(answer)
        filters, provenance = self._filters(judges)
        stream, rows = io.BytesIO(), list(answers.items())
        for start in range(0, len(rows), _BLOCK):
            block = dict(rows[start : start + _BLOCK])
            for pair in filters.pairs(block, provenance):
                append_row(stream, pair.to_row(), errors="surrogatepass")
            self._show(FILTERING, start + len(block), len(rows))
        try:
            write_whole(self.folder.out, stream.getvalue())
        except OSError as error:
            raise DataFileError(f"cannot write {self.folder.out}: {error.strerror}") from error
        return self.report(filters)

    def report(self, filters: Filters | None = None) -> NegativesReport:
        """The report on all answers so far; without ``filters``, nothing was kept or dropped."""
        results = self.folder.answers(self.requests)
        failed = [answer for answer in results if answer.failure]
        prompt_tokens = sum(answer.prompt_tokens or 0 for answer in results)
        completion_tokens = sum(answer.completion_tokens or 0 for answer in results)
        counted = prompt_tokens or completion_tokens
        dropped = filters.dropped if filters else {}
        return NegativesReport(
            out=str(self.folder.out),
            answers=str(self.folder.answers_path),
            sentences=len(self.sentences),
            requests=len(self.requests),
            answered=len(results) - len(failed),
            failed=len(failed),
            unasked=len(self.requests) - len(results),
            failed_sentences=len({answer.request.sentence for answer in failed}),
            failures=dict(Counter(answer.failure for answer in failed).most_common()),
            pairs=filters.pair_count if filters else 0,
            positives=filters.kept[POSITIVE] if filters else 0,
            negatives=filters.kept[NEGATIVE] if filters else 0,
            dropped={side: dict(counts.most_common()) for side, counts in dropped.items()},
            without_pair=dict(filters.without_pair.most_common()) if filters else {},
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            price=self.prices.of(prompt_tokens, completion_tokens) if counted else None,
            planned=self.planned,
            stopped=self.stopped,
        )

    def _filters(self, judges: Judges) -> tuple[Filters, dict[str, Any]]:
        """The filters, and the provenance that all sets share."""
        scorer, embed, nll_per_byte = judges.load(self.config)
        asking = self.settings["asking"]
        provenance = {
            **{name: asking[name] for name in ("writer", "prompts", "sampling")},
            "filters": {
                **self.config.thresholds(),
                "scorer": _identity(scorer),
                "similarity": _identity(embed),
                "closeness": _identity(nll_per_byte),
            },
        }
        cached = CachedScorer(scorer, self.folder.folder / "scores.jsonl")
        return Filters(self.config, cached, embed, nll_per_byte), provenance


def _checked(sentences: object) -> list[str]:
    """The distinct sentences, without surrounding white space."""
    if not isinstance(sentences, (list, tuple)):
        raise DataError(f"sentences must be a list of strings, but are {sentences!r:.60}")
    found: dict[str, str] = {}
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, str) or not sentence.strip():
            raise DataError(f"sentence {number} is {sentence!r:.60}; remove it, or add some text")
        try:
            sentence.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"sentence {number} is not valid Unicode text (character {error.start}: "
                f"{sentence[error.start]!r}); convert the source to UTF-8"
            ) from error
        found.setdefault(fold(sentence).casefold(), sentence.strip())
    if not found:
        raise DataError("there are no sentences to paraphrase; add at least one")
    if len(found) < len(sentences):
        logger.info("ignored %d repeated sentences", len(sentences) - len(found))
    return list(found.values())


def _identity(judge: Any) -> Any:
    """What identifies a model behind a filter, JSON-ready; ``None`` if there is none."""
    if judge is None:
        return None
    record = judge.record() if hasattr(judge, "record") else {}
    named = {"name": getattr(judge, "name", None), **record}
    kept = ("name", "model", "commit", "weights")
    return {name: named[name] for name in kept if named.get(name)} or type(judge).__name__
