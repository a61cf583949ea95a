"""The fusion rules: pure functions of log-probs. No state, no models, no tokenizers.

Every rule moves probability only among the *candidates*: the tokens that the vocabulary map reaches
and that are plausible under the target. Candidates keep their mass as a group and all other tokens
keep their probability, so end-of-text becomes neither more nor less likely.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusion_detox.config import FusionConfig
from fusion_detox.errors import DataError

_MAX_LOG = 104.0
"""In nats: no finite ratio of two float32 numbers is larger than e to this power."""
_HUGE = 1e30
"""Scores up to this size stay finite in float32 when another one is subtracted."""
_MAX_SHIFT = 1e30
"""In nats: sums of it stay finite in float32."""
_FADE = 1.0
"""In nats, around the limit of what is plausible: from no shift at its lower end to all of it."""
_NEWTON_STEPS = 4
_SATURATED = 1 - 1e-6
"""Scores up to this fraction of a soft cap are inverted; float32 cannot separate higher ones."""


class Selection(NamedTuple):
    """The tokens that may move, a few hundred of tens of thousands.

    Attributes:
        log_probs: ``(batch, vocab)`` float32, of the target. Its candidates are overwritten.
        broken: ``(batch, 1)`` bool, rows with NaN, with a score of +inf or with only -inf.
        ordinary: Whether no log-prob leaves the range of float32 when scores are normalised.
        places: ``(total,)`` ascending ``row * vocab + token`` of all candidates of all rows.
        columns: ``(batch, candidates)`` indices into ``places``. Shorter rows end with copies of
            their first candidate.
        tokens: ``(batch, candidates)`` ids.
        present: ``(batch, candidates)`` bool, ``False`` for the copies.
        logs: ``(batch, candidates)`` log-probs of the candidates, and -inf for copies.
        share: ``(batch, candidates)`` in 0..1, how much of its shift a candidate gets: less than 1
            near the edge of what is plausible; ``None`` if all get the whole.
        removed: ``(batch, vocab)`` bool, the tokens that lose all their probability, if any.
    """

    log_probs: Tensor
    broken: Tensor
    ordinary: bool
    places: Tensor
    columns: Tensor
    tokens: Tensor
    present: Tensor
    logs: Tensor
    share: Tensor | None
    removed: Tensor | None

    def at(self, values: Tensor) -> Tensor:
        """``(batch, candidates)`` columns of a ``(batch, vocab)`` tensor."""
        return values.gather(-1, self.tokens)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """One prepared fusion step: which tokens may move, and how far each moves.

    Attributes:
        scores: ``(batch, vocab)`` logits or log-probs of the target.
        chosen: The candidates and the target's log-probs.
        shift: Given a strength, how far the candidates' log-probs move, ``(batch, candidates)`` in
            nats, up to a constant per row.
        config: The rule and its settings.
        strength_scale: ``(batch,)`` factors of the strength; ``None`` for 1.
        context: ``(batch,)`` factors of all log-ratios within ``context_limit``, already in
            ``shift``; ``None`` for 1.
    """

    scores: Tensor
    chosen: Selection
    shift: Callable[[Tensor | float], Tensor]
    config: FusionConfig
    strength_scale: Tensor | None = None
    context: Tensor | None = None

    def strength(self) -> Tensor:
        """``(batch,)`` strengths: the configured one, or less if a budget or the context lowers it.

        It is 0 for rows with NaN, which are returned unchanged.
        """
        strength = torch.where(self.chosen.broken, 0.0, self._within_budget()[0])
        if self.context is not None:
            strength = strength * self.context[:, None]
        return strength.squeeze(-1).to(torch.float32)

    def fused(self) -> Tensor:
        """``(batch, vocab)`` normalised log-probs in the dtype of the scores.

        The candidates keep their mass as a group; that of removed tokens goes to them too. A group
        that would lose everything is left as it is.
        """
        strength, removes = self._within_budget()
        scores, chosen, dtype = self.scores, self.chosen, self.scores.dtype
        mass = torch.logsumexp(chosen.logs, -1, keepdim=True)
        if removes is not None:
            mass = torch.where(removes, torch.logaddexp(mass, self._removed_mass), mass)
        new, moves = self._moved(strength, mass)
        # A log-prob below the smallest number of the dtype must not become -inf, which forbids it.
        smallest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        new = torch.where(moves, new.clamp_min(smallest), chosen.at(chosen.log_probs))
        new = torch.where(chosen.present, new, new[:, :1])
        # Writing in place saves a copy, and a second call writes the same; autograd forbids it.
        write = torch.Tensor.scatter if chosen.log_probs.requires_grad else torch.Tensor.scatter_
        result = write(chosen.log_probs, -1, chosen.tokens, new)
        removed = None
        if chosen.removed is not None and removes is not None:
            removed = chosen.removed & removes & moves
            result = result.masked_fill(removed, -math.inf)
        if dtype != torch.float32 or not chosen.ordinary:
            forbidden = torch.isneginf(scores)
            forbidden = forbidden if removed is None else forbidden | removed
            result = result.clamp_min(smallest).masked_fill(forbidden, -math.inf)
        if bool(chosen.broken.any()):
            result = torch.where(chosen.broken, scores.float(), result)
        return result.to(dtype)

    @functools.cached_property
    def _removed_mass(self) -> Tensor:
        """``(batch, 1)`` log of the mass of the removed tokens, before any is removed."""
        assert self.chosen.removed is not None
        removed = self.chosen.log_probs.masked_fill(~self.chosen.removed, -math.inf)
        return torch.logsumexp(removed, -1, keepdim=True)

    def _moved(self, strength: Tensor | float, mass: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates' new log-probs, and which rows have any: all others keep theirs.

        A candidate's log-prob moves by ``share * (shift + c)``. The constant ``c`` of a row gives
        the group its mass; without shares it has a closed form, and a few Newton steps find it
        otherwise, since the log of the mass is convex in ``c``.

        Args:
            strength: ``(batch, 1)`` or one for all rows.
            mass: ``(batch, 1)`` log of the mass of the group.
        """
        logs, share, present = self.chosen.logs, self.chosen.share, self.chosen.present
        steps = self.shift(strength)
        new = (logs + steps).masked_fill(~present, -math.inf)
        total = torch.logsumexp(new, -1, keepdim=True)
        moves = ~torch.isneginf(total)
        if share is None:
            return new + (mass - total), moves
        partial = (logs + share * steps).masked_fill(~present, -math.inf)
        partial = torch.where(share == 0, logs, partial)
        constant = torch.where(moves, mass - total, 0.0)
        for _ in range(_NEWTON_STEPS):
            new = partial + share * constant
            largest = new.amax(-1, keepdim=True)
            probs = (new - largest).exp()
            total = probs.sum(-1, keepdim=True)
            slope = (probs * share).sum(-1, keepdim=True) / total
            constant = constant + (mass - largest - total.log()) / slope.clamp_min(1e-6)
        new = partial + share * constant
        return new + (mass - torch.logsumexp(new, -1, keepdim=True)), moves

    def _within_budget(self) -> tuple[Tensor | float, Tensor | None]:
        """``(batch, 1)`` largest strengths within the KL budget, and the rows to remove tokens in.

        ``KL(f_a ‖ p)`` grows with ``a``, apart from small effects of shares and soft-capped heads,
        under which bisection still ends within the budget. If removing the implausible tokens
        would by itself exceed the budget, they stay.
        """
        config, chosen = self.config, self.chosen
        removes = None if chosen.removed is None else torch.ones_like(chosen.broken)
        max_strength: Tensor | float = config.strength
        if self.strength_scale is not None:
            max_strength = config.strength * self.strength_scale[:, None]
        if config.kl_budget is None or not bool(chosen.present.any()):
            return max_strength, removes
        logs = chosen.logs
        own = torch.logsumexp(logs, -1, keepdim=True).exp()
        group = own
        if removes is not None:
            group = own + self._removed_mass.exp()
            removes = group * torch.log(group / own.clamp_min(1e-30)) <= config.kl_budget
            group = torch.where(removes, group, own)

        def divergence(strength: Tensor) -> Tensor:
            new, moves = self._moved(strength, group.log())
            probs = new.exp()
            moved = torch.where(probs > 0, probs * (new - logs), 0.0).sum(-1, keepdim=True)
            return torch.where(moves, moved, 0.0).nan_to_num(nan=0.0)

        low = torch.zeros_like(own)
        high = largest = torch.zeros_like(own) + max_strength
        within = divergence(high) <= config.kl_budget
        for _ in range(14):
            middle = (low + high) / 2
            fits = divergence(middle) <= config.kl_budget
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(within, largest, low), removes


def fuse(
    scores: Tensor,
    clean: Tensor,
    reference: Tensor | None,
    mapped: Tensor,
    config: FusionConfig,
    strength_scale: Tensor | None = None,
    context: Tensor | None = None,
    words: Tensor | None = None,
) -> Tensor:
    """Fuses the calibrator's distributions into the target's scores.

    Args:
        scores: ``(batch, vocab)`` logits or log-probs of the target; ``-inf`` forbids a token.
        clean: ``(batch, vocab)`` probabilities of the clean model in the target's vocabulary.
        reference: The same for the reference model; only the contrast rules read it.
        mapped: ``(vocab,)`` bool, the tokens that the vocabulary map reaches.
        config: The rule and its settings; ``context_kl`` is ignored here.
        strength_scale: ``(batch,)`` factors of the strength; 1 by default.
        context: ``(batch,)`` factors in 0..1 that ``context_kl`` gives; 1 by default. They scale
            the strength, except for log-ratios below ``-context_limit``.
        words: ``(batch, vocab)`` nats: the contrast rule moves such a token at least that far down.

    Returns:
        ``(batch, vocab)`` normalised log-probs in the dtype of ``scores``, or ``scores`` itself at
        strength 0. An input of ``-inf`` stays ``-inf``, and every other stays finite unless
        ``outside`` removes its token; rows with NaN are returned unchanged.

    Raises:
        DataError: The shapes differ.
    """
    for given in (clean, reference):
        if given is not None and given.shape != scores.shape:
            raise DataError(
                f"probabilities of shape {tuple(given.shape)} came with scores of shape "
                f"{tuple(scores.shape)}: pass one row for each row of scores"
            )
    if config.strength == 0:
        return scores
    step = prepare(scores, clean, reference, mapped, config, strength_scale, context, words)
    return step.fused()


def strength_used(
    scores: Tensor, clean: Tensor, reference: Tensor | None, mapped: Tensor, config: FusionConfig
) -> Tensor:
    """The strength that :func:`fuse` applies to each row, given the same arguments.

    Returns:
        ``(batch,)`` float32: ``config.strength``, or less if ``kl_budget`` lowers it; 0 for rows
        with NaN, which are returned unchanged.
    """
    return prepare(scores, clean, reference, mapped, config).strength()


def select(scores: Tensor, mapped: Tensor, config: FusionConfig) -> Selection:
    """Chooses the candidates: the plausible tokens that the map reaches.

    Plausible tokens reach a given fraction of the top probability (Li et al. 2023, eq. 3). Around
    that limit their share of the shift grows from 0 to 1, so that rounding of the scores changes
    little; at the limit, it is one half.

    Args:
        scores: ``(batch, vocab)`` logits or log-probs.
        mapped: ``(vocab,)`` or ``(batch, vocab)`` bool, the tokens that may move.
        config: ``plausibility`` and ``outside`` are used.
    """
    batch, vocab = scores.shape
    log_probs = torch.log_softmax(scores.float(), dim=-1)
    best = log_probs.amax(-1, keepdim=True)
    # Only a huge sum of scores can take a log-prob out of the range of float32.
    ordinary = not bool((scores.amax(-1).abs() > _HUGE).any())
    edge, width = None, 0.0
    if config.plausibility > 0:
        # What is removed is gone at once, so a candidate cannot lose its shift gradually.
        width = min(_FADE, -math.log(config.plausibility)) if config.outside == "keep" else 0.0
        edge = best + (math.log(config.plausibility) - width / 2)
        plausible = _at_least(log_probs, edge)
    else:
        plausible = log_probs > -math.inf
    removed = mapped & ~plausible if config.outside == "remove" else None
    places = _true_places(plausible)
    rows, tokens = places // vocab, places % vocab
    reached = mapped.expand_as(plausible)[rows, tokens]
    places, rows = places[reached], rows[reached]
    counts = torch.bincount(rows, minlength=batch)
    columns, present = _by_row(counts, len(places))
    logs = _at(log_probs, places, columns).masked_fill(~present, -math.inf)
    share = None
    if edge is not None and width:
        share = ((logs - edge) / width).clamp(0.0, 1.0).nan_to_num(nan=1.0)
    if config.max_candidates is not None and columns.shape[-1] > config.max_candidates:
        top = logs.topk(config.max_candidates + 1, -1)
        kept = top.indices[:, :-1].sort(-1).values
        within = present.gather(-1, kept)
        places, counts = places[columns.gather(-1, kept)[within]], within.sum(-1)
        last = top.values[:, -1:]  # -inf in rows with fewer candidates
        soft = (top.values[:, :1] - last).clamp_max(_FADE)
        cut = ((logs.gather(-1, kept) - last) / soft).clamp(0.0, 1.0).nan_to_num(nan=1.0)
        share = cut if share is None else torch.minimum(share.gather(-1, kept), cut)
        logs, present = logs.gather(-1, kept), within
        columns = _by_row(counts, len(places))[0]
        share, logs, present = (part[:, : columns.shape[-1]] for part in (share, logs, present))
    if not len(places):
        places = places.new_zeros(1)  # something to point to
    tokens = places[columns.clamp_max(len(places) - 1)] % vocab
    broken = torch.isnan(best)
    return Selection(
        log_probs, broken, ordinary, places, columns, tokens, present, logs, share, removed
    )


def _at_least(values: Tensor, limit: Tensor) -> Tensor:
    """``values >= limit``."""
    if values.device.type != "cpu":
        return values >= limit
    # numpy compares in an eighth of torch's time.
    return torch.from_numpy(values.detach().numpy() >= limit.detach().numpy())


def _true_places(flags: Tensor) -> Tensor:
    """The flat indices of what is true."""
    if flags.device.type != "cpu":
        return flags.view(-1).nonzero().view(-1)
    return torch.from_numpy(np.flatnonzero(flags.numpy()))


def _by_row(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Arranges consecutive candidates by row.

    Args:
        counts: ``(batch,)`` candidates of each row, of which there may be none.
        total: Their sum.

    Returns:
        ``(batch, widest)`` the index of each candidate, or of the row's first one where there are
        no more, and whether there is one.
    """
    widest = max(1, int(counts.max())) if len(counts) else 1
    order = torch.arange(widest, device=counts.device)
    present = order < counts[:, None]
    first = (counts.cumsum(0) - counts).clamp_max(max(0, total - 1))
    return torch.where(present, order, 0) + first[:, None], present


def _at(log_probs: Tensor, places: Tensor, columns: Tensor) -> Tensor:
    """The log-probs of candidates by row, if there are any."""
    if not len(places):
        return log_probs.new_zeros(columns.shape)
    return log_probs.view(-1)[places[columns]]


def prepare(
    scores: Tensor,
    clean: Tensor,
    reference: Tensor | None,
    mapped: Tensor,
    config: FusionConfig,
    strength_scale: Tensor | None = None,
    context: Tensor | None = None,
    words: Tensor | None = None,
) -> Fusion:
    """Prepares a step of a rule that works on distributions; arguments as in :func:`fuse`."""
    chosen = select(scores, mapped, config)
    clean = chosen.at(clean)
    reference, words = (None if one is None else chosen.at(one) for one in (reference, words))
    return prepare_candidates(
        scores, chosen, clean, reference, config, strength_scale, context, words
    )


def prepare_candidates(
    scores: Tensor,
    chosen: Selection,
    clean: Tensor,
    reference: Tensor | None,
    config: FusionConfig,
    strength_scale: Tensor | None = None,
    context: Tensor | None = None,
    words: Tensor | None = None,
) -> Fusion:
    """Prepares a step from the candidates' probabilities alone.

    Args:
        scores: See :func:`fuse`.
        chosen: What :func:`select` chose from the scores.
        clean: ``(batch, candidates)`` probabilities of the clean model.
        reference: The same for the reference model; only the contrast rules read it.
        config: See :func:`fuse`.
        strength_scale: See :func:`fuse`.
        context: See :func:`fuse`.
        words: ``(batch, candidates)``; see :func:`fuse`.
    """
    in_part = config.contrasts and not (config.context_limit is None and words is None)
    if context is not None and not in_part:
        strength_scale, context = times(strength_scale, context), None
    logs, present = chosen.logs, chosen.present
    if config.contrasts:
        assert reference is not None
        difference = log_ratio(clean, reference, config).masked_fill(~present, 0.0)
        if context is not None:
            limit = math.inf if config.context_limit is None else config.context_limit
            always = (difference + limit).clamp_max(0.0)
            difference = context[:, None] * (difference - always) + always
        if words is not None:
            held_back = -words.clamp_max(config.clip)
            difference = torch.where(words > 0, torch.minimum(difference, held_back), difference)
        shift = _times(difference)
    elif config.rule == "product":
        shift = _times(torch.log(clean + config.floor) - logs)
    else:
        # Weighted, so that a candidate at the edge changes neither distribution by coming or going.
        share = present if chosen.share is None else chosen.share.masked_fill(~present, 0.0)
        inside = logs - torch.logsumexp(logs + share.log(), dim=-1, keepdim=True)
        own = clean * share
        own = own / own.sum(-1, keepdim=True).clamp_min(1e-30)

        def shift(strength: Tensor | float) -> Tensor:
            return torch.log((1 - strength) * inside.exp() + strength * own) - inside

    return Fusion(scores, chosen, shift, config, strength_scale, context)


def prepare_aligned(
    scores: Tensor,
    projected: Tensor,
    known: Tensor,
    cap: float | None,
    config: FusionConfig,
    strength_scale: Tensor | None = None,
) -> Fusion:
    """Prepares a step of the aligned rule: last hidden states fused as logits (arXiv 2506.01266).

    The target's head is affine, ``W h + b``, and the weights of the fusion add up to 1, so
    ``W (a u + (1 - a) h) + b = a (W u + b) + (1 - a) (W h + b)``. A soft cap after the head,
    ``c tanh(x / c)``, is removed from the scores and applied again.

    Args:
        scores: ``(batch, vocab)`` logits of the target; log-probs too if the head has no cap.
        projected: ``(batch, vocab)`` the head's output for the calibrator's vectors ``u`` in the
            target's space, without the soft cap.
        known: ``(vocab,)`` bool, the columns that the head has.
        cap: The head's soft cap, if any.
        config: The settings.
        strength_scale: As in :func:`fuse`.
    """
    chosen = select(scores, known, config)._replace(ordinary=False)
    projected, logs = chosen.at(projected), chosen.logs
    if cap is None:
        shift = _times((projected - logs).clamp(-_MAX_SHIFT, _MAX_SHIFT))
    else:
        given = chosen.at(scores).float()
        bounded = (given / cap).clamp(-_SATURATED, _SATURATED)
        raw = cap * torch.atanh(bounded)
        # An earlier processor may have moved scores beyond the cap; keep that excess.
        rest = given - cap * bounded

        def shift(strength: Tensor | float) -> Tensor:
            mixed = (1 - strength) * raw + strength * projected
            return cap * torch.tanh(mixed / cap) + (1 - strength) * rest - logs

    return Fusion(scores, chosen, shift, config, strength_scale)


def log_ratio(clean: Tensor, reference: Tensor, config: FusionConfig) -> Tensor:
    """What non-toxic training changed: ``log q_clean - log q_reference``, denoised and bounded.

    Args:
        clean: Probabilities of any shape.
        reference: Probabilities of the same shape.
        config: ``floor``, ``threshold`` and ``clip`` are used.

    Returns:
        Nats within ``±clip``; negative for tokens that the clean model makes less likely.
    """
    ratio = torch.log((clean + config.floor) / (reference + config.floor))
    if not config.floor:  # 0 / 0 carries no information
        ratio = ratio.nan_to_num(nan=0.0, posinf=_MAX_LOG, neginf=-_MAX_LOG)
    if config.threshold:
        ratio = torch.nn.functional.softshrink(ratio, config.threshold)
    return ratio.clamp(-config.clip, config.clip)


def kl_divergence(one: Tensor, other: Tensor) -> Tensor:
    """``KL(one ‖ other)`` in nats, ``(batch,)``, of two ``(batch, vocab)`` tensors of log-probs."""
    probs = one.exp()
    return torch.where(probs > 0, probs * (one - other), 0.0).sum(-1)


def times(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The product of two factors, of which ``None`` is 1."""
    if one is None or other is None:
        return one if other is None else other
    return one * other


def fit(tensor: Tensor, width: int) -> Tensor:
    """Cuts the last dimension to ``width``, or pads it with zeros."""
    missing = width - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _times(difference: Tensor) -> Callable[[Tensor | float], Tensor]:
    def shift(strength: Tensor | float) -> Tensor:
        steps = strength * difference
        # A strength of 0 times a log-ratio of -inf moves nothing.
        return torch.where(steps.isnan(), 0.0, steps) if isinstance(strength, Tensor) else steps

    return shift
