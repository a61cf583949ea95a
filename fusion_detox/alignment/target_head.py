"""``TargetHead``: a target's output head, as a function from last hidden states to logits.

Most families compute ``W h + b``. Some scale this (Cohere, Granite), and some bound it by a soft
cap ``c tanh(x / c)`` (Gemma 2). The head is not looked up by family name: it is fitted to one
forward pass over a short text, and a model that does not fit is rejected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_detox.decoding.head_inputs import head_inputs, output_layer
from fusion_detox.decoding.session import plain_mode
from fusion_detox.errors import ModelError
from fusion_detox.files.models import check_causal
from fusion_detox.vocabulary.token_table import ENGLISH, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBE_TOKENS = 32
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_SCALES = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_REMEDY = "use a rule that needs no hidden states, such as contrast"

_NORMALS = 16
_MAX_SETS = 4
_GRID = 65
_REFINEMENTS = 40
_SEED = 20261121


class TargetHead:
    """The output head of a target, as a function of its last hidden states.

    Args:
        model: The target. It is run once on a few tokens; only its output layer is kept.
        tokenizer: The target's tokenizer.

    Attributes:
        width: Width of a hidden state.
        columns: Number of logits, including padding of the head.
        cap: Bound ``c`` of the soft cap ``c tanh(x / c)``, or ``None``.
        scale: Factor of the output layer's values.
        root_mean_square: Root mean square of the entries of the target's last hidden states.

    Raises:
        ModelError: The model is not a causal language model, names no output layer, or does not
            compute its logits with a scaled, biased or soft-capped output layer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_causal(model.config, type(model).__name__)
        self._layer = output_layer(model)
        settings = model.config.get_text_config()
        caps = [getattr(settings, name, None) for name in _CAPS]
        self.cap = next((float(cap) for cap in caps if cap), None)
        hidden, logits = _probe(model, tokenizer)
        self.width, self.columns = hidden.shape[-1], logits.shape[-1]
        self.root_mean_square = float(hidden.float().square().mean().sqrt())
        with plain_mode(hidden.device):
            values = self._layer(hidden).float()
        if values.shape != logits.shape:
            raise ModelError(
                f"{type(model).__name__}: the output layer returns {values.shape[-1]} values, but "
                f"the model returns {self.columns} logits; {_REMEDY}"
            )
        half = model.dtype in (torch.float16, torch.bfloat16)
        size = 1 + logits.abs().max()
        noise = (1e-2 if half else 1e-4) * size
        self.scale, self._bias = self._fit(values, logits, settings, noise)
        error = (self.apply_cap(self._affine(values)) - logits).abs().max()
        if not bool(error <= (5e-2 if half else 1e-3) * size):
            raise ModelError(
                f"{type(model).__name__}: the logits differ by up to {float(error):.3g} from those "
                f"of the output layer with any scale, bias and the configured soft cap; {_REMEDY}"
            )
        self._recovery: LogitRecovery | None = None
        weight = getattr(self._layer, "weight", None)
        if self.cap is not None and isinstance(weight, Tensor) and weight.is_floating_point():
            bias = self.uncapped_logits(torch.zeros(1, self.width))[0]
            with plain_mode(weight.device):
                self._recovery = LogitRecovery(
                    weight.detach(), self.scale, bias, self.cap, len(tokenizer)
                )

    def uncapped_logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states, without the soft cap.

        Args:
            hidden: ``(batch, width)``.

        Returns:
            ``(batch, columns)`` in float32 on the output layer's device.
        """
        weight = next(self._layer.parameters())
        dtype = weight.dtype if weight.is_floating_point() else hidden.dtype
        with plain_mode(weight.device):
            return self._affine(self._layer(hidden.to(weight.device, dtype)).float())

    def apply_cap(self, values: Tensor) -> Tensor:
        """Apply the soft cap, if the head has one."""
        return values if self.cap is None else self.cap * torch.tanh(values / self.cap)

    def recover_logits(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Recover the head's logits from scores that may be log-probs.

        Without a soft cap, a constant per row does no harm, so scores are returned unchanged.

        Args:
            scores: ``(batch, vocab)``.

        Returns:
            Logits, and ``(batch,)``, the rows whose logits are known; ``None`` means all.
        """
        if self._recovery is None:
            return scores, None
        return self._recovery.recover(scores)

    def _fit(
        self, values: Tensor, logits: Tensor, settings: Any, noise: Tensor
    ) -> tuple[float, Tensor | None]:
        """Scale and bias that turn the layer's values into logits; no bias if it is only noise."""
        raw = logits
        usable = torch.ones_like(logits, dtype=torch.bool)
        if self.cap is not None:
            usable = (logits / self.cap).abs() < 0.9
            raw = self.cap * torch.atanh((logits / self.cap).clamp(-0.9, 0.9))
        count = usable.sum(0, keepdim=True).clamp_min(1)

        def centred(matrix: Tensor) -> Tensor:  # by column, which removes any bias
            mean = torch.where(usable, matrix, 0.0).sum(0, keepdim=True) / count
            return torch.where(usable, matrix - mean, 0.0)

        x, y = centred(values), centred(raw)
        scale = float((x * y).sum() / x.square().sum().clamp_min(1e-30))
        # Prefer 1, or a scale that the configuration names, to a fit with rounding errors.
        named = [getattr(settings, name, None) for name in _SCALES]
        named += [1 / d for name in _DIVISORS if (d := getattr(settings, name, None))]
        near = [n for n in (1.0, *named) if n and abs(scale / n - 1) < 1e-2]
        scale = float(min(near, key=lambda n: abs(scale / n - 1))) if near else scale
        bias = torch.where(usable, raw - scale * values, 0.0).sum(0) / count[0]
        return scale, None if bool(bias.abs().max() <= noise) else bias

    def _affine(self, values: Tensor) -> Tensor:
        values = values * self.scale if self.scale != 1 else values
        return values if self._bias is None else values + self._bias.to(values.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> TargetHead:
        """Return itself: the weights belong to the target and never change."""
        return self


def _probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Hidden states ``(tokens, width)`` and logits ``(tokens, columns)`` of a short text."""
    (ids,) = encode(tokenizer, [ENGLISH])
    untyped: Any = model
    with plain_mode(model.device), head_inputs(model) as seen:
        tokens = torch.tensor([ids[:_PROBE_TOKENS]], device=model.device)
        logits: Tensor = untyped(input_ids=tokens, use_cache=False).logits
    if not seen or seen[-1].shape[:-1] != logits.shape[:-1]:
        raise ModelError(
            f"{type(model).__name__} does not compute its logits from the output embeddings and "
            f"the last hidden states, so hidden states cannot be fused; {_REMEDY}"
        )
    hidden = seen[-1][0]
    return hidden, logits[0].to(hidden.device).float()


class LogitRecovery:
    """Recovers the logits of a soft-capped head from log-probs.

    Beam search passes log-probs ``s`` to a processor: the logits minus a constant ``o`` per row.
    The constant does not matter to a linear head, but a soft cap ``c tanh(x / c)`` can only be
    inverted on the logits themselves. The constant can be found because logits lie in a subspace:
    if a set ``S`` has more columns than a hidden state has entries, there are vectors ``n`` with
    ``n W_S = 0``. Then ``n · (c atanh((s + o) / c) - b)`` is 0 for the right ``o``.

    Args:
        weight: ``(columns, width)``, the output layer's ``W``.
        scale: Factor of the output layer's values.
        bias: ``(columns,)``, ``b``, which is added to them.
        cap: The soft cap ``c``.
        columns: Number of leading columns that belong to tokens.
    """

    def __init__(
        self, weight: Tensor, scale: float, bias: Tensor, cap: float, columns: int
    ) -> None:
        self._cap, self._bias = cap, bias
        columns, width = min(columns, len(weight)), weight.shape[1]
        size = min(columns, 2 * width + 64)
        generator = torch.Generator().manual_seed(_SEED)
        order = torch.randperm(columns, generator=generator).to(weight.device)
        # Several sets, because one forbidden token makes a set unusable.
        fits = size >= width + _NORMALS
        starts = range(0, max(1, columns - size + 1), size) if fits else ()
        self._sets: list[tuple[Tensor, Tensor]] = []
        for start in list(starts)[:_MAX_SETS]:
            chosen = order[start : start + size]
            basis, _ = torch.linalg.qr(scale * weight[chosen].float())
            vectors = torch.randn(size, _NORMALS, generator=generator).to(weight.device)
            vectors[:, 0] = 1.0  # the most sensitive to a constant
            normals = vectors - basis @ (basis.t() @ vectors)
            self._sets.append((chosen, torch.nn.functional.normalize(normals, dim=0)))

    def recover(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Add the constant back to the rows that are log-probs.

        Args:
            scores: ``(batch, vocab)``, logits or log-probs.

        Returns:
            Logits in float32, and ``(batch,)``, the rows whose logits are known.
        """
        scores = scores.float()
        best = scores.amax(-1, keepdim=True)
        known = best.squeeze(-1) > 0  # log-probs are at most 0
        # Logits differ by at most twice the cap; a lower score is that of a forbidden token.
        possible = scores >= best - 2 * self._cap
        offset = torch.zeros_like(scores[:, :1])
        for chosen, normals in self._sets:
            if bool(known.all()) or scores.shape[-1] <= int(chosen.max()):
                continue
            columns = chosen.to(scores.device)
            rows = ~known & possible[:, columns].all(-1)
            if bool(rows.any()):
                offset[rows] = self._search(
                    scores[rows].masked_fill(~possible[rows], -torch.inf),
                    scores[rows][:, columns],
                    self._bias[chosen].to(scores.device),
                    normals.to(scores.device),
                )
                known = known | rows
        return scores + offset, known

    def _search(self, scores: Tensor, columns: Tensor, bias: Tensor, normals: Tensor) -> Tensor:
        """``(rows, 1)``, the offset that puts the columns into the head's subspace."""
        finite = torch.isfinite(scores)
        low = -self._cap - scores.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
        high = self._cap - scores.masked_fill(~finite, -torch.inf).amax(-1, keepdim=True)

        def error(offset: Tensor) -> Tensor:
            ratio = ((columns + offset) / self._cap).clamp(-1 + 1e-6, 1 - 1e-6)
            values = self._cap * torch.atanh(ratio) - bias
            return (values @ normals).square().sum(-1, keepdim=True)

        # A grid, then ternary search around its best point.
        step = (high - low) / (_GRID + 1)
        errors = torch.cat([error(low + i * step) for i in range(1, _GRID + 1)], -1)
        best = low + (errors.argmin(-1, keepdim=True) + 1) * step
        low, high = best - step, best + step
        for _ in range(_REFINEMENTS):
            third = (high - low) / 3
            left = error(low + third) < error(high - third)
            low, high = torch.where(left, low, low + third), torch.where(left, high - third, high)
        return (low + high) / 2
