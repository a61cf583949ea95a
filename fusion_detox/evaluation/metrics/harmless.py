"""How far fusion moves the target on text that it should leave alone, by teacher forcing.

The target and the processor read given text as if the target had written it. At each position the
two next-token distributions are compared: ``KL(fused ‖ base)``, whether the most probable token is
another, and the log-prob of the token that the text has.

The first token of a text is context only, as no distribution stands before it: the BOS where the
tokenizer adds one (then every token of the text itself counts), else the text's own first token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusion_detox.config import FusionConfig
from fusion_detox.errors import DataError, ModelError
from fusion_detox.evaluation.metrics.fluency import context_limit, length_batches
from fusion_detox.evaluation.metrics.statistics import (
    Floats,
    Interval,
    Resamples,
    finite,
    ratio_interval,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Processor = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class TextChange:
    """What fusion changed at each position of a text; arrays of ``(positions,)``.

    Attributes:
        kl: ``KL(fused ‖ base)`` in nats.
        changed: Whether the base's most probable token is none of the fused most probable ones.
        loss_base: Negative log-prob of the text's token under the base, in nats.
        loss_fused: The same under fusion; infinite where it leaves the token no probability.
        strength: The strength used; nan where the processor has none, as a word filter.
    """

    kl: Floats
    changed: NDArray[np.bool_]
    loss_base: Floats
    loss_fused: Floats
    strength: Floats

    @property
    def tokens(self) -> int:
        """Positions that were compared."""
        return len(self.kl)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None = None) -> list[int]:
    """A text's tokens for :func:`change_on_texts`, as the tokenizer begins a text.

    What the tokenizer puts after a text (T5-like ones close it) is removed.

    Args:
        tokenizer: The target's.
        text: Any.
        limit: Tokens to keep, from the start; all by default.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    special: list[int] = list(encoded["special_tokens_mask"])
    while ids and special[len(ids) - 1]:
        ids.pop()
    return ids[:limit]


def change_on_texts(
    model: PreTrainedModel,
    processor: Processor,
    texts: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
) -> list[TextChange]:
    """Compares the target with and without a processor at each position of given texts.

    Texts of different length share a batch: the processor sees those that still go on, and their
    prefixes without any padding. It must be a function of its arguments alone.

    Args:
        model: The target.
        processor: A logits processor. If it has a method ``with_strength(input_ids, scores)`` that
            returns the fused scores and the ``(batch,)`` strengths used, that is called; else the
            strength is that of its ``config``, if that has no ``kl_budget`` or ``context_kl``.
        texts: Token ids of the target, from :func:`text_ids`.
        batch_size: Texts at a time; fewer where their logits would take more than 1 GiB.

    Returns:
        One a text, in order, with one position fewer than the text has tokens.

    Raises:
        DataError: A text does not fit into the model's context.
        ConfigError: ``batch_size`` is below 1.
        ModelError: The model or the processor gives no distribution at some position.
    """
    limit = context_limit(model)
    lengths = [max(len(ids) - 1, 0) for ids in texts]
    for number, length in enumerate(lengths):
        if limit is not None and length > limit:
            raise DataError(
                f"text {number} has {length + 1} tokens, but the model reads {limit} positions; "
                "cut it (text_ids has a limit), or leave it out"
            )
    found = [_text_change([])] * len(texts)
    width = int(model.config.get_text_config().vocab_size)
    for batch in length_batches(lengths, batch_size, width):
        rows = [index for index in batch if lengths[index]]
        if not rows:
            continue
        steps = _read(model, processor, [texts[index] for index in rows])
        for row, index in enumerate(rows):
            found[index] = _text_change([step[:, row] for step in steps[: lengths[index]]])
            if np.isnan(found[index].kl).any():
                raise ModelError(
                    f"no distribution after {int(np.isnan(found[index].kl).argmax()) + 1} tokens "
                    f"of text {index}: the scores of the model, or what the processor made of "
                    "them, are not finite; the weights are damaged or their dtype is too narrow"
                )
    return found


def harmless(changes: Sequence[TextChange], draws: Resamples, name: str) -> dict[str, Any]:
    """Change on harmless text, as ``results.json`` holds it.

    Args:
        changes: Of each text.
        draws: Resamples of as many texts.
        name: What the texts are.

    Returns:
        ``text`` with ``name`` and the numbers of ``texts`` (that have a position) and ``tokens``;
        ``kl``, ``top1_changed``, ``loss_base`` and ``loss_fused``, means over tokens with intervals
        over texts; ``kl_largest``; ``strength`` with ``mean`` and percentiles over tokens, ``None``
        if unknown; and ``impossible``, the number of tokens of the text that fusion gave no
        probability, with which ``loss_fused`` is infinite, and so ``None``.

    Raises:
        DataError: ``draws`` are of another number.
    """
    tokens = np.array([change.tokens for change in changes], dtype=np.float64)

    def mean(attribute: str) -> Interval:
        sums = [float(getattr(change, attribute).sum()) for change in changes]
        return ratio_interval(sums, tokens, draws)

    largest = [float(change.kl.max()) for change in changes if change.tokens]
    return {
        "text": {"name": name, "texts": int((tokens > 0).sum()), "tokens": int(tokens.sum())},
        "kl": mean("kl"),
        "kl_largest": finite(max(largest)) if largest else None,
        "top1_changed": mean("changed"),
        "strength": _strengths(changes),
        "loss_base": mean("loss_base"),
        "loss_fused": mean("loss_fused"),
        "impossible": impossible(changes),
    }


def impossible(changes: Sequence[TextChange]) -> int:
    """How many tokens of the texts fusion gave no probability, though the base gave some."""
    return sum(int((np.isposinf(c.loss_fused) & ~np.isposinf(c.loss_base)).sum()) for c in changes)


def _read(model: PreTrainedModel, processor: Processor, texts: list[Sequence[int]]) -> list[Floats]:
    """Steps of ``(5, rows that still go on)``; the texts come with the longest first."""
    import torch

    from fusion_detox.fusion import kl_divergence

    longest = len(texts[0])
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in texts]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts]
    ids = torch.tensor(padded, device=model.device)
    steps = []
    # Not inference_mode: the processor may keep what it computes, for calls outside of it.
    with torch.no_grad():
        logits = model(
            input_ids=ids[:, :-1],
            attention_mask=torch.tensor(mask, device=model.device)[:, :-1],
            use_cache=False,
        ).logits
        precise = torch.float32 if logits.device.type == "mps" else torch.float64
        for seen in range(1, longest):
            going = sum(len(text) > seen for text in texts)
            # In float32, as generate() hands scores to processors.
            scores = logits[:going, seen - 1].float()
            fused_scores, strength = _process(processor, ids[:going, :seen], scores)
            base = scores.to(precise).log_softmax(-1)
            fused = fused_scores.to(precise).log_softmax(-1)
            own = ids[:going, seen, None]
            best = fused.gather(-1, base.argmax(-1, keepdim=True)).squeeze(-1)
            broken = torch.isnan(fused).any(-1) | torch.isnan(base).any(-1)
            columns = (
                kl_divergence(fused, base).masked_fill(broken, math.nan),
                (best < fused.amax(-1)).to(precise),
                -base.gather(-1, own).squeeze(-1),
                -fused.gather(-1, own).squeeze(-1),
                strength.to(precise),
            )
            steps.append(torch.stack(columns).double().cpu().numpy())
    return steps


def _process(processor: Processor, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    teller: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    teller = getattr(processor, "with_strength", None)
    if teller is not None:
        fused, strength = teller(ids, scores)
        return fused, strength.to(scores.device)
    config = getattr(processor, "config", None)
    used = math.nan
    if isinstance(config, FusionConfig) and config.kl_budget is None and config.context_kl is None:
        used = config.strength
    return processor(ids, scores), scores.new_full((len(scores),), used)


def _text_change(steps: Sequence[Floats]) -> TextChange:
    """Of one text, from its five numbers at each step."""
    kl, changed, base, fused, strength = np.array(steps, dtype=np.float64).reshape(-1, 5).T
    # Rounding can leave a divergence of 0 just below it.
    return TextChange(np.where(kl < 0, 0.0, kl), changed > 0, base, fused, strength)


def _strengths(changes: Sequence[TextChange]) -> dict[str, float] | None:
    used = np.concatenate([np.zeros(0), *(change.strength for change in changes)])
    if not used.size or np.isnan(used).any():
        return None
    values = (used.mean(), *np.percentile(used, [5, 50, 95]))
    # They were float32, in which 0.4 is 0.4000000059604645.
    return {
        name: round(float(value), 6)
        for name, value in zip(("mean", "p5", "p50", "p95"), values, strict=True)
    }
