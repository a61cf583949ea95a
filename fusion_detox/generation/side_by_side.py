"""Writes one completion with and one without fusion, token by token, with settings that may change.

Both sides use the same noise as ``sampling``, so with constant settings they write what
``generate_rows`` writes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusion_detox.generation.sampling import (
    Job,
    Sampling,
    completion_ends,
    continuation_text,
    prompt_ids,
    token_chooser,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.processor import FusionLogitsProcessor


class LiveSettings(NamedTuple):
    """Settings that may change while a text is written.

    Attributes:
        strength: See ``FusionConfig``.
        kl_budget: See ``FusionConfig``.
    """

    strength: float
    kl_budget: float | None = None


class StreamedToken(NamedTuple):
    """One token of a side.

    Attributes:
        text: What it adds to the text; empty for a part of a character.
        change: How far fusion moves its log-prob, in nats. The side without fusion shows what
            fusion would do.
        replaced: On the side with fusion, the token that the target alone would have written here
            with the same noise; ``None`` if it is the same token.
        strength: The strength that was applied.
    """

    text: str
    change: float
    replaced: str | None
    strength: float


@dataclasses.dataclass
class Side:
    """One of the two texts, as far as it is written.

    Attributes:
        fused: Whether it is written with fusion.
        tokens: Its tokens.
        ids: Their ids.
        seconds: Time spent on writing it, without what is only measured for display.
        finished: Whether the model ended the text.
    """

    fused: bool
    tokens: list[StreamedToken] = dataclasses.field(default_factory=list)
    ids: list[int] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(token.text for token in self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Speed of writing; 0 before the first token."""
        return len(self.ids) / self.seconds if self.seconds else 0.0


def write_side_by_side(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: FusionLogitsProcessor,
    job: Job,
    sampling: Sampling,
    live: Callable[[], LiveSettings] | None = None,
) -> Iterator[tuple[Side, Side]]:
    """Write both texts and yield them after each step; they are updated in place.

    Args:
        model: The target, a causal language model.
        tokenizer: The target's tokenizer.
        processor: The fusion.
        job: The prompt.
        sampling: Sampling settings.
        live: Called before each step, so that a change acts on the next token; by default, the
            processor's own settings.

    Yields:
        The side without and the side with fusion.

    Raises:
        ConfigError: A live setting is out of range, or there is no chat template for a chat.
        DataError: The prompt and the completion do not fit into the model's context.
        InertError: With the live settings, the check of the processor fails.
        ModelError: The model's scores are not finite.
    """
    prompt = prompt_ids(model, tokenizer, job, sampling.max_new_tokens)
    ends = completion_ends(model, tokenizer, chat=job.chat)
    choose = token_chooser(sampling, job, len(prompt))
    writers = [
        _Writer(model, tokenizer, prompt, choose, ends, Side(fused)) for fused in (False, True)
    ]
    base, fused = (writer.side for writer in writers)
    settings: LiveSettings | None = None
    used = processor
    for _ in range(sampling.max_new_tokens):
        if live is not None and (wanted := live()) != settings:
            settings = wanted
            used = processor.with_settings(**wanted._asdict())
        for writer in writers:
            if not writer.side.finished:
                writer.step(used)
        yield base, fused
        if base.finished and fused.finished:
            return


class _Writer:
    """Writes one side, with a KV cache of its own if the model has one."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        choose: Callable[[Tensor, Tensor], int],
        ends: frozenset[int],
        side: Side,
    ) -> None:
        self._model, self._tokenizer, self._prompt = model, tokenizer, list(prompt)
        self._choose, self._ends, self.side = choose, ends, side
        self._cache: Any = None
        self._shown = 0

    def step(self, processor: FusionLogitsProcessor) -> None:
        """Writes one token."""
        side, began = self.side, time.perf_counter()
        row = torch.tensor([[*self._prompt, *side.ids]], device=self._model.device)
        scores = self._scores(row)
        if side.fused:
            fused, strength = processor.with_strength(row, scores)
        id = self._choose(row, fused if side.fused else scores)
        side.seconds += time.perf_counter() - began
        if id in self._ends:
            side.finished = True
            return
        alone = id
        if side.fused:
            alone = self._choose(row, scores)
        else:
            fused, strength = processor.with_strength(row, scores)
        before, after = (torch.log_softmax(one.float(), -1)[0, id] for one in (scores, fused))
        replaced = None if alone == id else self._text([*side.ids, alone])[self._shown :]
        side.ids.append(id)
        text = self._text(side.ids)
        added, self._shown = text[self._shown :], max(self._shown, len(text))
        side.tokens.append(
            StreamedToken(added, (after - before).item(), replaced, strength[0].item())
        )

    def _scores(self, row: Tensor) -> Tensor:
        """``(1, vocab)`` float32 logits of the next token."""
        with torch.no_grad():
            if self._cache is None:
                output = self._model(input_ids=row, use_cache=True)
            else:
                output = self._model(
                    input_ids=row[:, -1:], past_key_values=self._cache, use_cache=True
                )
        # Models with another kind of state read the whole text again.
        self._cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _text(self, ids: Sequence[int]) -> str:
        # An unfinished character decodes to U+FFFD until its last byte arrives.
        return continuation_text(self._tokenizer, self._prompt, ids).rstrip("\ufffd")
