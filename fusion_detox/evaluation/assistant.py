"""What fusion does to the answers of an assistant.

The requests in ``prompts/assistant.jsonl`` were written for this package (Apache-2.0): harmless
ones on everyday topics, provoking ones that ask for insults or vulgar text, and conversations, half
of which end in a provoking request.

A harmless answer stays the same if greedy decoding with fusion writes what the target writes alone.
No second generation is needed to find out: as long as no token differs, both have read the same
prefix, so at each token of the target's answer the most probable token under fusion is the
one that greedy decoding would choose. The first that differs ends the agreement. One pass over the
target's answer therefore gives the exact place of the first change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion_detox.errors import ConfigError, DataFileError
from fusion_detox.evaluation.config import EvaluationConfig
from fusion_detox.evaluation.folder import RunFolder
from fusion_detox.evaluation.metrics.fluency import context_limit
from fusion_detox.evaluation.metrics.harmless import TextChange, changes_on_texts
from fusion_detox.evaluation.metrics.statistics import (
    Resamples,
    finite,
    mean_interval,
    ratio_interval,
)
from fusion_detox.evaluation.samples import SampleFiles
from fusion_detox.evaluation.sampling import Sampler
from fusion_detox.evaluation.targets import Prepared, Target
from fusion_detox.generation.chat import chat_prompt, has_chat_template, ids_after_answer
from fusion_detox.generation.sampling import Sampling, jobs, pad_token_id, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HARMLESS, PROVOKING, CONVERSATION = "harmless", "provoking", "multi_turn"
KINDS = (HARMLESS, PROVOKING, CONVERSATION)
_FILE = Path(__file__).with_name("prompts") / "assistant.jsonl"


@dataclasses.dataclass(frozen=True)
class Request:
    """A request: its kind, and the user's and the assistant's messages in turn."""

    kind: str
    messages: tuple[str, ...]


def read_requests(limit: int | None = None) -> list[Request]:
    """The built-in requests: all, or at most ``limit`` spread evenly over them.

    Raises:
        DataFileError: The file is missing or damaged.
    """
    try:
        rows = [json.loads(line) for line in _FILE.read_text("utf-8").splitlines()]
        found = [Request(row["kind"], tuple(row["messages"])) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataFileError(f"cannot read {_FILE}: {error}; reinstall the package") from error
    count = len(found) if limit is None else min(limit, len(found))
    return [found[number * len(found) // count] for number in range(count)]


def is_assistant(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model stops at the end of its turn in the tokenizer's chat template.

    Some base models have a chat template, but do not stop there.
    """
    return has_chat_template(tokenizer) and not stop_ids(model).isdisjoint(
        ids_after_answer(tokenizer)
    )


class AssistantSuite:
    """Puts the requests to the variants of one target.

    Args:
        target: The target; it has a chat template.
        config: How many requests, and how long the answers are.

    Raises:
        ConfigError: There is no chat template, the template refuses a conversation, or a
            request and its answer exceed the target's context.
    """

    def __init__(self, target: Target, config: EvaluationConfig) -> None:
        self._target, self._config = target, config
        requests = read_requests(config.assistant_requests)
        texts = {
            kind: [
                chat_prompt(target.tokenizer, one.messages) for one in requests if one.kind == kind
            ]
            for kind in KINDS
        }
        self._harmless = texts[HARMLESS]
        self._provoking = texts[PROVOKING] + texts[CONVERSATION]
        # The text of the template holds its special tokens.
        self._harmless_ids, self._provoking_ids = (
            [list(target.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in some]
            for some in (self._harmless, self._provoking)
        )
        self._check()
        self.key = _digest(self._harmless_ids, config.assistant_tokens, config.resamples)
        answers = _digest(self._provoking_ids, config.assistant_tokens)
        self.about: dict[str, Any] = {
            "answers": answers,
            "kinds": {kind: len(texts[kind]) for kind in (PROVOKING, CONVERSATION)},
            "seed": config.seeds[0],
            "samples": config.assistant_samples,
        }
        """Facts for ``config.json``: where the sampled answers are."""

    @property
    def work(self) -> dict[str, int]:
        """Tokens to write for the harmless requests, to compare, and to write for the others."""
        tokens = self._config.assistant_tokens
        sampled = len(self._provoking) * self._config.assistant_samples
        return {HARMLESS: len(self._harmless) * tokens, PROVOKING: sampled * tokens}

    def answer_harmless(
        self, run: RunFolder, sampler: Sampler, base: Prepared, report: Callable[[int, int], None]
    ) -> None:
        """Generates the target's greedy answers to the harmless requests."""
        greedy = Sampling(max_new_tokens=self._config.assistant_tokens, greedy=True)
        encoded = dict(enumerate(self._harmless_ids))
        stem = self._greedy_stem(base)
        wanted = jobs(self._harmless) if self._harmless else []
        sampler.run(wanted, encoded, [greedy], None, run.path, stem, report=report)

    def answer_provoking(
        self,
        run: RunFolder,
        sampler: Sampler,
        prepared: Prepared,
        report: Callable[[int, int], None],
    ) -> None:
        """Samples a variant's answers to the provoking requests and the conversations."""
        config = self._config
        sampling = dataclasses.replace(
            config.sampling(config.seeds[0]),
            max_new_tokens=config.assistant_tokens,
            samples=config.assistant_samples,
        )
        encoded = dict(enumerate(self._provoking_ids))
        wanted = jobs(self._provoking, config.assistant_samples) if self._provoking else []
        stem = answers_stem(prepared.stem, self.about)
        sampler.run(wanted, encoded, [sampling], prepared.processor, run.path, stem, report=report)

    def changes(
        self,
        run: RunFolder,
        base: Prepared,
        variants: Sequence[Prepared],
        report: Callable[[int, int], None],
    ) -> list[dict[str, Any]]:
        """How each variant changes the target's answers to harmless requests; see ``unchanged``."""
        model, stops = self._target.model, stop_ids(self._target.model)
        answers = SampleFiles(run.path / "samples", self._greedy_stem(base)).read()
        rows = [answers[key] for key in sorted(answers)]
        prompts = [self._harmless_ids[row.index] for row in rows]
        # The token that ended an answer is not stored. Any that stops stands for it here.
        ends = [[min(stops)] if row.finish == "stop" else [] for row in rows]
        changes = changes_on_texts(
            model,
            [one.processor for one in variants if one.processor is not None],
            [
                [*prompt, *row.ids, *end]
                for prompt, row, end in zip(prompts, rows, ends, strict=True)
            ],
            starts=list(map(len, prompts)),
            pad_token_id=pad_token_id(model, self._target.tokenizer),
            batch_size=self._config.batch_size,
            report=report,
        )
        stopped = [row.finish == "stop" for row in rows]
        return [unchanged(one, stopped, stops, self._config.resamples) for one in changes]

    def _greedy_stem(self, base: Prepared) -> str:
        return f"{base.stem}-assistant-greedy-{self.key}"

    def _check(self) -> None:
        limit, tokens = context_limit(self._target.model), self._config.assistant_tokens
        longest = max(map(len, [*self._harmless_ids, *self._provoking_ids]))
        if limit is not None and longest + tokens > limit:
            raise ConfigError(
                f"the requests to the assistant have up to {longest} tokens, and with {tokens} "
                f"new ones exceed the {limit} positions of the target; lower assistant_tokens, or "
                "leave the assistant out (--no-assistant)"
            )


def answers_stem(stem: str, about: dict[str, Any]) -> str:
    """Names the files of a variant's sampled answers."""
    return f"{stem}-assistant-{about['answers']}"


def unchanged(
    changes: Sequence[TextChange], stopped: Sequence[bool], stops: Collection[int], resamples: int
) -> dict[str, Any]:
    """How far greedy answers stay the same under fusion, as in ``results.json``.

    Args:
        changes: The change at each token of each answer, including the one that ended it.
        stopped: Whether the model ended the answer itself. Ending it with another token that
            stops is then no change.
        stops: The tokens that end an answer.
        resamples: Number of bootstrap resamples.

    Returns:
        ``answers`` and ``tokens``, their numbers; ``unchanged``, the share of answers without any
        change, with its interval over answers; ``first_change``, the median number of the first
        changed token (from 1) in the other answers, ``None`` if there are none; and ``kl``,
        ``KL(fused ‖ target)`` in nats per token with its interval, with its 95th percentile
        ``kl_p95``.
    """
    first: list[int | None] = []
    for change, ended in zip(changes, stopped, strict=True):
        differs = change.changed.copy()
        if ended and int(change.best[-1]) in stops:
            differs[-1] = False
        first.append(int(differs.argmax()) + 1 if differs.any() else None)
    changed = [place for place in first if place is not None]
    tokens = [change.tokens for change in changes]
    draws = Resamples(len(changes), 0, resamples)
    kl = np.concatenate([change.kl for change in changes])
    return {
        "answers": len(changes),
        "tokens": sum(tokens),
        "unchanged": mean_interval([place is None for place in first], draws),
        "first_change": float(np.median(changed)) if changed else None,
        "kl": ratio_interval([float(change.kl.sum()) for change in changes], tokens, draws),
        "kl_p95": finite(float(np.percentile(kl, 95))),
    }


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
