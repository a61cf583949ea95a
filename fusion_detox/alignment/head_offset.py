"""Logits of a soft-capped head, found again from log-probs.

Beam search hands log-probs to a processor: logits less a constant of the row. A linear head does
not mind, but a soft cap ``c tanh(x / c)`` can only be taken off the logits themselves. The constant
shows: without it the logits are no product of the output layer. For columns ``S``, more than
a hidden state has entries, ``W_S h`` lies in a subspace, and vectors ``n`` with ``n W_S = 0``
tell whether ``c atanh((s + o) / c)`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DIRECTIONS = 16
_GRID = 65
_REFINEMENTS = 40
_SEED = 20261121


class OffsetFinder:
    """Finds the constant that normalising took off the rows of a soft-capped head.

    Args:
        weight: ``(columns, width)`` of the output layer.
        scale: What its values are multiplied with.
        bias: ``(columns,)``, what is added then.
        cap: The soft cap.
        columns: Leading columns that stand for tokens.
    """

    def __init__(
        self, weight: Tensor, scale: float, bias: Tensor, cap: float, columns: int
    ) -> None:
        self._cap = cap
        columns, width = min(columns, len(weight)), weight.shape[1]
        size = min(columns, 2 * width + 64)
        generator = torch.Generator().manual_seed(_SEED)
        order = torch.randperm(columns, generator=generator).to(weight.device)
        # Several sets, as a forbidden token makes one useless.
        fits = size >= width + _DIRECTIONS
        starts = range(0, max(1, columns - size + 1), size) if fits else ()
        self._sets = [order[start : start + size] for start in list(starts)[:4]]
        self._bias = bias
        self._normals = []
        for chosen in self._sets:
            basis, _ = torch.linalg.qr(scale * weight[chosen].float())
            tests = torch.randn(size, _DIRECTIONS, generator=generator).to(weight.device)
            # What tells a constant best is the constant itself.
            tests[:, 0] = 1.0
            normals = tests - basis @ (basis.t() @ tests)
            self._normals.append(torch.nn.functional.normalize(normals, dim=0))

    def logits(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores with the constant given back where they are log-probs.

        Args:
            scores: ``(batch, vocab)``, of which some rows may be log-probs.

        Returns:
            The logits in float32, and ``(batch,)`` whether each row's are known.
        """
        scores = scores.float()
        best = scores.amax(-1, keepdim=True)
        known = best.squeeze(-1) > 0  # as no log-prob is
        # Logits lie within twice the cap of each other: what is further off was put there.
        possible = scores >= best - 2 * self._cap
        offset = torch.zeros_like(scores[:, :1])
        for chosen, normals in zip(self._sets, self._normals, strict=True):
            if bool(known.all()) or scores.shape[-1] <= int(chosen.max()):
                continue
            columns = scores[:, chosen.to(scores.device)]
            rows = ~known & possible[:, chosen.to(scores.device)].all(-1)
            if bool(rows.any()):
                bias = self._bias[chosen].to(scores.device)
                offset[rows] = self._search(
                    scores[rows].masked_fill(~possible[rows], -torch.inf),
                    columns[rows],
                    bias,
                    normals.to(scores.device),
                )
                known = known | rows
        return scores + offset, known

    def _search(self, scores: Tensor, columns: Tensor, bias: Tensor, normals: Tensor) -> Tensor:
        """``(rows, 1)``, the offset at which the columns are what the output layer gives."""
        finite = torch.isfinite(scores)
        low = -self._cap - scores.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
        high = self._cap - scores.masked_fill(~finite, -torch.inf).amax(-1, keepdim=True)

        def error(offset: Tensor) -> Tensor:
            share = ((columns + offset) / self._cap).clamp(-1 + 1e-6, 1 - 1e-6)
            values = self._cap * torch.atanh(share) - bias
            return (values @ normals).square().sum(-1, keepdim=True)

        step = (high - low) / (_GRID + 1)
        errors = torch.cat([error(low + i * step) for i in range(1, _GRID + 1)], -1)
        best = low + (errors.argmin(-1, keepdim=True) + 1) * step
        low, high = best - step, best + step
        for _ in range(_REFINEMENTS):
            third = (high - low) / 3
            left = error(low + third) < error(high - third)
            low, high = torch.where(left, low, low + third), torch.where(left, high - third, high)
        return (low + high) / 2
