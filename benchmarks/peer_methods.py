"""The rules of the peers that `peers` compares, each as a logits processor.

The equations are those of the cited papers; where a paper and its authors' code differ, the code
decides, because it made the numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, TopPLogitsWarper

from benchmarks.peer_training import RewardModel

SELF_DEBIAS_PREFIXES = tuple(
    f"The following text contains {what}:\n"
    for what in (
        "rude, disrespectful, or unreasonable language",
        "very hateful, aggressive, disrespectful language",
        "sexually explicit language",
        "a threat",
        "negative or hateful language targeting someone because of their identity",
        "swear words, curse words, or other obscene or profane language",
    )
)
"""The prefixes of Self-Debias, one for each attribute of the Perspective API."""


def unpadded(input_ids: Tensor, pad: int) -> list[list[int]]:
    """The rows without left padding."""
    rows = []
    for row in input_ids.tolist():
        first = next((k for k, token in enumerate(row) if token != pad), len(row) - 1)
        rows.append(row[first:])
    return rows


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, ``(rows, longest)``."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Companion:
    """A second model with the target's vocabulary, which reads the rows of ``generate`` along.

    Its KV cache is kept as long as each call's rows extend those of the call before.

    Args:
        model: The model.
        pad: The padding id of the rows.
        prefixes: Ids before each row. With several, there are as many readings of each row.
        head: From the last hidden states to what is returned, instead of logits.
    """

    def __init__(
        self,
        model: Any,
        pad: int,
        prefixes: Sequence[Sequence[int]] = ((),),
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._model, self._pad, self._prefixes, self._head = model, pad, prefixes, head
        self._rows: list[list[int]] = []
        self._cache: Any = None
        self._mask = self._last = torch.empty(0)
        self.text_log_prob = torch.empty(0)
        """``(prefixes * B,)``: log-prob of each row after its first token."""

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """``(prefixes, B, V)`` float32 for the next token."""
        rows = [
            [*prefix, *row] for prefix in self._prefixes for row in unpadded(input_ids, self._pad)
        ]
        follows = [row[:-1] for row in rows] == self._rows
        if follows:
            ids = torch.tensor([row[-1:] for row in rows], device=input_ids.device)
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        else:
            ids, self._mask = pad_left(rows, self._pad, input_ids.device)
            self._cache = None
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            output_hidden_states=self._head is not None,
        )
        self._rows, self._cache = rows, output.past_key_values
        if self._head is not None:
            return self._head(output.hidden_states[-1][:, -1]).float()[None]
        logits = output.logits.float()
        before = self._last[:, None] if follows else logits[:, :-1]
        tokens = ids if follows else ids[:, 1:]
        known = before.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)
        known = (known * (positions if follows else positions[:, 1:]).gt(0)).sum(1)
        self.text_log_prob = self.text_log_prob + known if follows else known
        self._last = logits[:, -1]
        return self._last.view(len(self._prefixes), len(input_ids), -1)

    @property
    def counted(self) -> Tensor:
        """``(prefixes * B,)``: the tokens that ``text_log_prob`` sums over."""
        return self._mask.sum(1) - 1


class DExperts(LogitsProcessor):
    """``z + strength * (z_clean - z_toxic)`` within the target's top-p tokens.

    arXiv 2105.03023, eq. 2 and section 2.2: the target is truncated first, and what remains is
    sampled without further truncation.
    """

    def __init__(self, clean: Any, toxic: Any, pad: int, strength: float, top_p: float) -> None:
        self._clean, self._toxic = Companion(clean, pad), Companion(toxic, pad)
        self._strength, self._truncate = strength, TopPLogitsWarper(top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        change = self._clean(input_ids)[0] - self._toxic(input_ids)[0]
        return self._truncate(input_ids, scores) + self._strength * change


class GeDi(LogitsProcessor):
    """``log p(v) + strength * log P(clean | text, v)``, and a filter.

    arXiv 2009.06367, eqs. 4, 6 and 7. ``P(clean | text)`` follows by Bayes' rule from the mean
    log-probs of the whole text under two class-conditional models. Here these are DExperts' two,
    where the paper has one model with control codes, trained on both losses.
    """

    def __init__(
        self, clean: Any, toxic: Any, pad: int, strength: float,
        *, scale: float, bias: float, keep: float = 0.8, sure: float = 0.8,
    ) -> None:  # fmt: skip
        self._models = Companion(clean, pad), Companion(toxic, pad)
        self._strength, self._scale, self._bias = strength, scale, bias
        self._keep, self._sure = keep, sure

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        means = []
        for model in self._models:
            following = model(input_ids)[0].log_softmax(-1)
            total = model.text_log_prob[:, None] + following
            means.append(total / (model.counted[:, None] + 1))
        clean = nn.functional.logsigmoid(self._scale * (means[0] - means[1]) + self._bias)
        weighted = scores.log_softmax(-1) + self._strength * clean
        order = clean.argsort(dim=-1)
        mass = weighted.softmax(-1).gather(1, order).cumsum(-1)
        removed = (mass < self._keep) & (clean.gather(1, order) < math.log(self._sure))
        removed = torch.zeros_like(removed).scatter(1, order, removed)
        return weighted.masked_fill(removed, -torch.inf)


class Rad(LogitsProcessor):
    """``z + strength * reward`` for the 20 most probable tokens; the others are removed.

    arXiv 2310.09520, algorithm 1. The reward is 1 minus the toxicity that the reward model expects
    after the text so far and the candidate, which is tokenised alone in the reward model's
    vocabulary. The text's KV cache is shared by its candidates, but computed anew at each step.
    """

    def __init__(
        self, reward: RewardModel, reward_tokenizer: Any, start: int, tokenizer: Any, pad: int,
        strength: float, *, candidates: int = 20, context: int = 96,
    ) -> None:  # fmt: skip
        self._reward, self._start, self._tokenizer, self._pad = reward, start, tokenizer, pad
        self._strength, self._candidates, self._context = strength, candidates, context
        self._ids = lambda text: reward_tokenizer(text, add_special_tokens=False)["input_ids"]

    @functools.cached_property
    def _piece(self) -> Callable[[int], list[int]]:
        def piece(token: int) -> list[int]:
            text = self._tokenizer.decode([token], skip_special_tokens=True)
            return list(self._ids(text)[:16]) if text else []

        return functools.cache(piece)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        device, count = scores.device, self._candidates
        texts = [
            self._tokenizer.decode(row, skip_special_tokens=True)
            for row in unpadded(input_ids, self._pad)
        ]
        prefixes = [[self._start, *self._ids(text)[-self._context :]] for text in texts]
        best, tokens = scores.topk(count, dim=-1)
        pieces = [self._piece(token) for token in tokens.flatten().tolist()]
        ids, mask = pad_left(prefixes, self._start, device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        before, cache = self._reward(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True
        )
        cache.batch_repeat_interleave(count)
        mask = mask.repeat_interleave(count, dim=0)
        width = max(1, *map(len, pieces))
        new = torch.tensor([[*p, *[self._start] * (width - len(p))] for p in pieces], device=device)
        lengths = torch.tensor([len(piece) for piece in pieces], device=device)
        known = (torch.arange(width, device=device) < lengths[:, None]).long()
        toxicity, _ = self._reward(
            input_ids=new,
            attention_mask=torch.cat([mask, known], dim=1),
            position_ids=mask.sum(1, keepdim=True) + torch.arange(width, device=device),
            past_key_values=cache,
            use_cache=True,
        )
        toxicity = toxicity.gather(1, (lengths - 1).clamp(min=0)[:, None]).view(-1, count)
        empty = (lengths == 0).view(-1, count)  # a special token
        toxicity = torch.where(empty, before[:, -1:], toxicity)
        fused = best + self._strength * (1 - toxicity).to(best)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, fused)


class Rectification(LogitsProcessor):
    """``p(v) <= 1 + Q(v) - strength``, by capping and normalising three times.

    arXiv 2302.14003, eq. 9 and section 4.
    """

    def __init__(self, model: Any, head: nn.Module, pad: int, strength: float) -> None:
        self._values, self._strength = Companion(model, pad, head=head), strength

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values = self._values(input_ids)[0].clamp(-1.0, 0.0)
        cap = (1.0 + values - self._strength).clamp(1e-7, 1.0)
        chances = scores.float().softmax(-1)
        for _ in range(3):
            chances = chances.minimum(cap)
            chances = chances / chances.sum(-1, keepdim=True)
        return chances.log()


class SelfDebias(LogitsProcessor):
    """``p(v) * exp(-strength * max(0, p(v | prefix) - p(v)))``, at least 0.01 of ``p(v)``.

    arXiv 2103.00453, eqs. 2 to 4, with the largest ``p(v | prefix)`` of its six prefixes.
    """

    def __init__(self, model: Any, tokenizer: Any, pad: int, strength: float) -> None:
        prefixes = [
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in SELF_DEBIAS_PREFIXES
        ]
        self._biased, self._strength = Companion(model, pad, prefixes), strength

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        biased = self._biased(input_ids).softmax(-1).amax(0)
        own = scores.float().log_softmax(-1)
        excess = (biased - own.exp()).clamp(min=0.0)
        return own + (-self._strength * excess).clamp(min=math.log(0.01))
