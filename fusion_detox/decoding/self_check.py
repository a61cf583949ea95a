"""Proves that fusion acts: on the texts for which a calibrator says what must happen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusion_detox.vocabulary.token_table import ENGLISH, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fusion_detox.calibrator.probes import Probe

Ids = tuple[int, ...]

_CHAT_PROBES = 4
_WORD_TOKENS = 6
_FILLERS = 256
_REQUEST = "Please tell me about your day."
# Scores of the candidates; one token stands out, so that a plausibility of 1 leaves only that one.
_LIKELY, _MOST_LIKELY = 0.0, 0.05
_ROUNDING = 1e-5
_LEAST_GAP = 0.01
"""In nats per unit of strength, up to strength 1: how much more the avoided words must lose."""
_LEAST_SHARE = 2 / 3
"""Of the comparisons of an avoided word with a kept one."""

_SETTINGS = (
    "the settings allow no change (a tiny clip, a large threshold or a plausibility near 1), or "
    "the calibrator's two models are equal"
)
_MODELS = (
    "the calibrator's clean and reference models are swapped or damaged, or the vocabulary map "
    "belongs to another tokenizer"
)
_READING = {
    "plain text": "the bytes of the tokenizer's tokens are decoded wrongly, or it rewrites text",
    "the chat template": "the template drops or rewrites the text of answers",
}


Step = Callable[[Sequence[Ids], Tensor], Tensor]
"""Rows of target ids, and their scores, to new scores."""


class _View(NamedTuple):
    """One way of encoding the probes: each context's ids, and those before them."""

    name: str
    rows: list[tuple[Probe, Ids]]


def find_fault(
    fuse: Step,
    read: Callable[[Ids], bytes],
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    *,
    width: int,
    strength: float,
    device: torch.device,
    target: Step | None = None,
) -> str | None:
    """Why fusion does not do what it should, or ``None`` if it does.

    Each context is encoded plainly and, if there is a chat template, as the beginning of an answer
    in it. Then one step is fused after it, and after each token of each word. The scores of this
    step are equal for some hundred tokens, and ``-inf`` for all others.

    Args:
        fuse: One step of fusion.
        read: The text that the calibrator reads in a row of target ids.
        tokenizer: The target's tokenizer.
        probes: What must happen; without probes, some token must move.
        width: Number of columns of the scores.
        strength: The strength of ``fuse``.
        device: Where the scores are made.
        target: Replaces the equal scores by those of a plausible target.
    """
    views = _views(tokenizer, probes)
    for view in views:
        for probe, ids in view.rows:
            seen = read(ids).decode(errors="replace")
            if not _letters(seen).endswith(_letters(probe.context)):
                return (
                    f"in {view.name}, the calibrator reads {seen[-80:]!r} instead of "
                    f"{probe.context!r}. Likely reason: {_READING[view.name]}"
                )
    words = {probe: _words(tokenizer, probe) for probe in probes}
    needed: dict[Ids, int] = {}
    for view in views:
        for probe, before in view.rows:
            for tokens in words[probe].values():
                for end in range(len(tokens)):
                    needed.setdefault((*before, *tokens[:end]), len(needed))
    sample = tuple(encode(tokenizer, [ENGLISH])[0])
    rows = list(needed) or [sample[:4], sample[:12]]
    fillers = [id for id in dict.fromkeys(sample) if id < width][:_FILLERS]
    used = {id for found in words.values() for tokens in found.values() for id in tokens}
    columns = torch.tensor(sorted(used.union(fillers)), device=device)
    scores = torch.full((len(rows), width), -math.inf, device=device)
    scores[:, columns] = _LIKELY
    scores[:, fillers[0]] = _MOST_LIKELY
    if target is not None:
        scores = target(rows, scores)
    shift = (fuse(rows, scores).float() - scores.log_softmax(-1))[:, columns]
    scale = min(1.0, strength)
    if not shift.abs().max().item() > _ROUNDING * scale:
        return f"at strength {strength:g}, no token's score changes. Likely reasons: {_SETTINGS}"
    # A row's constant says nothing: remove it, so that the tokens of a word can be added up.
    moved: list[list[float]] = (shift - shift.median(-1, keepdim=True).values).tolist()
    by_row = {
        row: dict(zip(columns.tolist(), moved[number], strict=True))
        for row, number in needed.items()
    }
    for view in views:
        fault = _judge(view, words, by_row, scale)
        if fault is not None:
            return f"at strength {strength:g}, in {view.name}, {fault}"
    return None


def _judge(
    view: _View,
    words: dict[Probe, dict[str, Ids]],
    moved: dict[Ids, dict[int, float]],
    scale: float,
) -> str | None:
    """What is wrong with how the words of a view moved, or ``None``."""
    gaps, wins = [], []
    for probe, before in view.rows:
        found = {
            word: sum(moved[(*before, *tokens[:end])][token] for end, token in enumerate(tokens))
            for word, tokens in words[probe].items()
        }
        avoided = [found[word] for word in probe.avoided if word in found]
        kept = [found[word] for word in probe.kept if word in found]
        if avoided and kept:
            gaps.append(fmean(kept) - fmean(avoided))
            wins += [(a < k) + (a == k) / 2 for a in avoided for k in kept]
    if not gaps:  # the tokenizer splits no word so that it can be compared
        return None
    gap, share = fmean(gaps), fmean(wins)
    if gap >= _LEAST_GAP * scale and share >= _LEAST_SHARE:
        return None
    numbers = (
        f"the words to avoid move by {-gap:+.3g} nats relative to harmless words, and fall behind "
        f"them in {share:.0%} of the comparisons, but must move by {-_LEAST_GAP * scale:g} or less "
        f"and fall behind in {_LEAST_SHARE:.0%}"
    )
    reason = _MODELS if abs(gap) >= _LEAST_GAP * scale else f"{_SETTINGS}; or {_MODELS}"
    return f"{numbers}. Likely reasons: {reason}"


def _views(tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe]) -> list[_View]:
    """The probes in plain text and, if there is a usable one, in the chat template."""
    if not probes:
        return []
    plain = [(probe, tuple(encode(tokenizer, [probe.context])[0])) for probe in probes]
    views = [_View("plain text", plain)]
    if getattr(tokenizer, "chat_template", None):
        chat = [(probe, _in_chat(tokenizer, probe.context)) for probe in probes[:_CHAT_PROBES]]
        views.append(_View("the chat template", [(p, ids) for p, ids in chat if ids is not None]))
    return views


def _in_chat(tokenizer: PreTrainedTokenizerBase, answer: str) -> Ids | None:
    """The ids of a conversation up to the end of an unfinished answer.

    ``None`` if the template refuses the conversation.
    """
    text = None
    for wrap in (str, _parts):
        turns: list[Any] = [
            {"role": "user", "content": wrap(_REQUEST)},
            {"role": "assistant", "content": wrap(answer)},
        ]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception:  # noqa: BLE001 - templates raise what they like
            continue
        if answer in text:
            text = text[: text.rindex(answer) + len(answer)]
            break
    return None if text is None else tuple(encode(tokenizer, [text])[0])


def _parts(text: str) -> list[dict[str, str]]:
    """A message as the templates of some multimodal models need it."""
    return [{"type": "text", "text": text}]


def _words(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> dict[str, Ids]:
    """The tokens of each word after the context; without words that change the context's."""
    words = [*probe.avoided, *probe.kept]
    before, *texts = encode(tokenizer, [probe.context, *(probe.context + word for word in words)])
    size = len(before)
    return {
        word: tuple(ids[size : size + _WORD_TOKENS])
        for word, ids in zip(words, texts, strict=True)
        if ids[:size] == before and len(ids) > size
    }


def _letters(text: str) -> str:
    """A text without what tokenizers may change: spacing and case."""
    return "".join(text.split()).casefold()
