"""How much fusion changes the target's distributions on harmless text, by teacher forcing.

The target and the processor read a given text as if the target had written it. At each position,
the two next-token distributions are compared by ``KL(fused ‖ base)``, by whether the most
probable token changed, and by the log-prob of the text's token.

The first token of a text is context only, since no distribution precedes it. It is the BOS token if
the tokenizer adds one (then all tokens of the text count), and otherwise the text's first token.
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
from fusion_detox.evaluation.heap import Heap
from fusion_detox.evaluation.metrics.fluency import (
    context_limit,
    length_batches,
    pad_right,
    without_closing,
)
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
    """The change at each position of a text; arrays ``(positions,)``.

    Attributes:
        kl: ``KL(fused ‖ base)`` in nats.
        changed: Whether fusion makes another token more probable than the base's most probable one.
        loss_base: Negative log-prob of the text's token under the base, in nats.
        loss_fused: The same under fusion; infinite if fusion gives the token no probability.
        strength: The strength used; nan if the processor has none, such as a word filter.
        best: The most probable token under fusion.
    """

    kl: Floats
    changed: NDArray[np.bool_]
    loss_base: Floats
    loss_fused: Floats
    strength: Floats
    best: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def tokens(self) -> int:
        """Number of positions."""
        return len(self.kl)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None = None) -> list[int]:
    """The token ids of a text for :func:`changes_on_texts`.

    Special tokens at the start are kept; those at the end, as in T5-like tokenizers, are removed.

    Args:
        tokenizer: The target's tokenizer.
        text: The text.
        limit: Number of tokens to keep from the start, by default all.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    return without_closing(encoded)[0][:limit]


def changes_on_texts(
    model: PreTrainedModel,
    processors: Sequence[Processor],
    texts: Sequence[Sequence[int]],
    *,
    starts: Sequence[int] | None = None,
    pad_token_id: int = 0,
    batch_size: int = 32,
    report: Callable[[int, int], None] | None = None,
) -> list[list[TextChange]]:
    """Compares the target with several processors, and runs the target only once.

    Texts of different lengths share a batch. At each position, a processor sees only the texts that
    reach it, as prefixes that are padded on the left if their ``starts`` differ, as in
    ``generate``. It must be a pure function of its arguments.

    Args:
        model: The target.
        processors: Logits processors. If one has a method ``with_strength(input_ids, scores)``,
            which returns the fused scores and the strengths ``(batch,)``, that method is called.
            Otherwise, the strength in its ``config`` is used if that has no ``kl_budget`` or
            ``context_kl``.
        texts: Token ids of the target; see :func:`text_ids`.
        starts: The number of tokens of each text that are context only, at least 1; by default 1.
        pad_token_id: The id for padding on the left.
        batch_size: Maximum texts per batch; fewer if their logits would exceed 1 GiB.
        report: Called with ``(done, total)`` texts.

    Returns:
        For each processor, one result per text, in order. Each has as many positions as the text
        has tokens after its start.

    Raises:
        DataError: A text exceeds the model's context.
        ConfigError: ``batch_size`` is below 1.
        ModelError: The scores at some position are not a distribution.
    """
    limit = context_limit(model)
    starts = [1] * len(texts) if starts is None else starts
    lengths = [max(len(ids) - 1, 0) for ids in texts]
    positions = [max(len(ids) - start, 0) for ids, start in zip(texts, starts, strict=True)]
    for number, length in enumerate(lengths):
        if limit is not None and length > limit:
            raise DataError(
                f"text {number} has {length + 1} tokens, but the model has {limit} positions; "
                "truncate it (see the limit of text_ids), or leave it out"
            )
    found = [[_text_change([])] * len(texts) for _ in processors]
    width = int(model.config.get_text_config().vocab_size)
    heap, done = Heap(), 0
    if report is not None:
        report(0, len(texts))
    for batch in length_batches(lengths, batch_size, width):
        rows = sorted((index for index in batch if positions[index]), key=lambda i: -positions[i])
        if rows:
            given = [texts[index] for index in rows], [starts[index] for index in rows]
            steps = _compare(model, processors, *given, pad_token_id, heap)
        for row, index in enumerate(rows):
            for of_processor, changes in zip(steps, found, strict=True):
                mine = [step[:, row] for step in of_processor[: positions[index]]]
                changes[index] = _text_change(mine)
                broken = np.isnan(changes[index].kl)
                if broken.any():
                    raise ModelError(
                        "no next-token distribution after "
                        f"{int(broken.argmax()) + starts[index]} tokens of text {index}: the "
                        "scores of the model or processor are not finite. The weights are "
                        "damaged, or their dtype is too narrow; try float32"
                    )
        done += len(batch)
        if report is not None:
            report(done, len(texts))
    return found


def harmless(changes: Sequence[TextChange], draws: Resamples, name: str) -> dict[str, Any]:
    """Change on harmless text, as in ``results.json``.

    Args:
        changes: The change of each text.
        draws: Resamples of the same number of texts.
        name: Name of the texts.

    Returns:
        ``text`` with ``name`` and the numbers of ``texts`` (with at least one position) and
        ``tokens``; ``kl``, ``top1_changed``, ``loss_base`` and ``loss_fused``, means over tokens
        with intervals over texts; ``kl_largest``; ``strength`` with ``mean`` and percentiles over
        tokens, ``None`` if unknown; and ``impossible``, the number of tokens that fusion gave no
        probability. If there are any, ``loss_fused`` is infinite and therefore ``None``.

    Raises:
        DataError: The number of texts differs from that of ``draws``.
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
    """The number of tokens with no probability under fusion, but some under the base."""
    return sum(int((np.isposinf(c.loss_fused) & ~np.isposinf(c.loss_base)).sum()) for c in changes)


def _compare(
    model: PreTrainedModel,
    processors: Sequence[Processor],
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    pad: int,
    heap: Heap,
) -> list[list[Floats]]:
    """The fields of ``TextChange`` per processor and step, ``(6, rows left)``.

    The text with the most positions comes first.
    """
    import torch

    from fusion_detox.fusion import kl_divergence

    ids, mask = pad_right(texts, model.device)
    width, first = max(starts), torch.tensor(starts, device=model.device)
    padded = [
        [pad] * (width - start) + list(text) for text, start in zip(texts, starts, strict=True)
    ]
    joined, _ = pad_right(padded, model.device)
    steps: list[list[Floats]] = [[] for _ in processors]
    # Not inference_mode: the processor may cache tensors for later calls outside it.
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False).logits
        precise = torch.float32 if logits.device.type == "mps" else torch.float64
        for seen in range(width, width + len(texts[0]) - starts[0]):
            left = sum(len(text) > seen for text in padded)
            rows = torch.arange(left, device=logits.device)
            # generate() passes scores to processors in float32.
            scores = logits[rows, first[:left] - 1 + seen - width].float()
            base = scores.to(precise).log_softmax(-1)
            favourite, bad = base.argmax(-1, keepdim=True), torch.isnan(base).any(-1)
            own = joined[:left, seen, None]
            loss = -base.gather(-1, own).squeeze(-1)
            for processor, found in zip(processors, steps, strict=True):
                fused_scores, strength = _process(processor, joined[:left, :seen], scores)
                fused = fused_scores.to(precise).log_softmax(-1)
                highest, best = fused.max(-1)
                columns = (
                    kl_divergence(fused, base).masked_fill(
                        bad | torch.isnan(fused).any(-1), math.nan
                    ),
                    (fused.gather(-1, favourite).squeeze(-1) < highest).to(precise),
                    loss,
                    -fused.gather(-1, own).squeeze(-1),
                    strength.to(precise),
                    best.to(precise),
                )
                found.append(torch.stack(columns).double().cpu().numpy())
            heap.watch()
    return steps


def _process(processor: Processor, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    with_strength = getattr(processor, "with_strength", None)
    if with_strength is not None:
        fused, strength = with_strength(ids, scores)
        return fused, strength.to(scores.device)
    config = getattr(processor, "config", None)
    used = math.nan
    if isinstance(config, FusionConfig) and config.kl_budget is None and config.context_kl is None:
        used = config.strength
    return processor(ids, scores), scores.new_full((len(scores),), used)


def _text_change(steps: Sequence[Floats]) -> TextChange:
    table = np.array(steps, dtype=np.float64).reshape(-1, 6).T
    kl, changed, base, fused, strength, best = table
    # Rounding can turn a divergence of 0 slightly negative.
    kl = np.where(kl < 0, 0.0, kl)
    return TextChange(kl, changed > 0, base, fused, strength, best.astype(np.int64))


def _strengths(changes: Sequence[TextChange]) -> dict[str, float] | None:
    used = np.concatenate([np.zeros(0), *(change.strength for change in changes)])
    if not used.size or np.isnan(used).any():
        return None
    values = (used.mean(), *np.percentile(used, [5, 50, 95]))
    # Rounded because float32 stores 0.4 as 0.4000000059604645.
    return {
        name: round(float(value), 6)
        for name, value in zip(("mean", "p5", "p50", "p95"), values, strict=True)
    }
