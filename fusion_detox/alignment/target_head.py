"""``TargetHead``: what a target's output layer makes of hidden states, scale and soft cap included.

Most families compute ``W h + b``. Some scale that (Cohere, Granite), some bound it with
``c tanh(x / c)`` (Gemma 2). Which of it a model does is not looked up by name but found out by
running it once on a few tokens, and refused where none of it explains the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_detox.alignment.head_offset import OffsetFinder
from fusion_detox.decoding.head_inputs import head_inputs, output_layer
from fusion_detox.decoding.session import plain_mode
from fusion_detox.errors import ModelError
from fusion_detox.files.models import check_causal
from fusion_detox.vocabulary.token_table import ENGLISH, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBE_TOKENS = 32
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_SCALES = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_REMEDY = "use a rule that needs no hidden states, such as contrast"


class TargetHead:
    """The output layer of a target, as a function of its last hidden states.

    Args:
        model: The target. It is run once, on a few tokens; only its output layer is kept.
        tokenizer: Its tokenizer.

    Attributes:
        width: Entries of a hidden state.
        columns: Logits, padding of the head included.
        cap: Bound ``c`` of ``c tanh(x / c)``, or ``None``.
        scale: What the output layer's values are multiplied with.
        root_mean_square: Of the entries of the target's own last hidden states.

    Raises:
        ModelError: The model is no causal language model, names no output layer, or its logits
            are no scaled, biased or soft-capped product of it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_causal(model.config, type(model).__name__)
        self._layer = output_layer(model)
        settings = model.config.get_text_config()
        self.cap = _first(settings, _CAPS)
        hidden, logits = self._probe(model, tokenizer)
        self.width, self.columns = hidden.shape[-1], logits.shape[-1]
        self.root_mean_square = float(hidden.float().square().mean().sqrt())
        self.scale, self._offset = 1.0, None
        with plain_mode(hidden.device):
            plain = self._layer(hidden).float()
        if plain.shape != logits.shape:
            raise ModelError(
                f"{type(model).__name__}: its output layer gives {plain.shape[-1]} values, but the "
                f"model {self.columns} logits; {_REMEDY}"
            )
        half = model.dtype in (torch.float16, torch.bfloat16)
        self.scale, self._offset = self._fit(plain, logits, settings, 1e-2 if half else 1e-4)
        error = (self.bounded(self._affine(plain)) - logits).abs().max()
        allowed = (5e-2 if half else 1e-3) * (1 + logits.abs().max())
        if not bool(error <= allowed):
            raise ModelError(
                f"{type(model).__name__}: its logits differ by up to {float(error):.3g} from what "
                f"its output layer gives, scaled and soft-capped as its settings say; {_REMEDY}"
            )
        self._offsets = self._offset_finder(len(tokenizer))

    def _offset_finder(self, tokens: int) -> OffsetFinder | None:
        weight = getattr(self._layer, "weight", None)
        if self.cap is None or not isinstance(weight, Tensor) or not weight.is_floating_point():
            return None
        bias = self.carried(torch.zeros(1, self.width))[0]
        with plain_mode(weight.device):
            return OffsetFinder(weight.detach(), self.scale, bias, self.cap, tokens)

    def carried(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, without the soft cap.

        Args:
            hidden: ``(batch, width)``.

        Returns:
            ``(batch, columns)`` in float32 on the output layer's device.
        """
        weight = next(self._layer.parameters())
        dtype = weight.dtype if weight.is_floating_point() else hidden.dtype
        with plain_mode(weight.device):
            values = self._layer(hidden.to(weight.device, dtype))
            return self._affine(values.float())

    def logits(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The head's own logits behind scores that may be log-probs.

        Without a soft cap any constant of a row does no harm, and scores are returned as they are.

        Args:
            scores: ``(batch, vocab)``.

        Returns:
            Logits, and ``(batch,)`` for which rows they are known; ``None`` for all.
        """
        if self._offsets is None:
            return scores, None
        return self._offsets.logits(scores)

    def _probe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Tensor, Tensor]:
        """``(tokens, width)`` and ``(tokens, columns)`` of a short text."""
        (ids,) = encode(tokenizer, [ENGLISH])
        whole: Any = model
        with plain_mode(model.device), head_inputs(model) as seen:
            tokens = torch.tensor([ids[:_PROBE_TOKENS]], device=model.device)
            logits: Tensor = whole(input_ids=tokens, use_cache=False).logits
        if not seen or seen[-1].shape[:-1] != logits.shape[:-1]:
            raise ModelError(
                f"{type(model).__name__} does not call its output embeddings on the last hidden "
                f"states, so that these cannot be fused; {_REMEDY}"
            )
        hidden = seen[-1][0]
        return hidden, logits[0].to(hidden.device).float()

    def _fit(
        self, plain: Tensor, logits: Tensor, settings: Any, noise: float
    ) -> tuple[float, Tensor | None]:
        """Scale and bias between the output layer and the logits; a bias within noise is none."""
        raw = logits
        usable = torch.ones_like(logits, dtype=torch.bool)
        if self.cap is not None:
            usable = (logits / self.cap).abs() < 0.9
            raw = self.cap * torch.atanh((logits / self.cap).clamp(-0.9, 0.9))
        # Differences to a column's mean, which no bias changes.
        count = usable.sum(0, keepdim=True).clamp_min(1)

        def centred(values: Tensor) -> Tensor:
            mean = torch.where(usable, values, 0.0).sum(0, keepdim=True) / count
            return torch.where(usable, values - mean, 0.0)

        moved, wanted = centred(plain), centred(raw)
        scale = float((moved * wanted).sum() / moved.square().sum().clamp_min(1e-30))
        named = [getattr(settings, name, None) for name in _SCALES]
        named += [1 / d for name in _DIVISORS if (d := getattr(settings, name, None))]
        # Rounding aside it is one that the configuration names.
        near = [n for n in (1.0, *named) if n and abs(scale / n - 1) < 1e-2]
        scale = float(min(near, key=lambda n: abs(scale / n - 1))) if near else scale
        rest = torch.where(usable, raw - scale * plain, 0.0).sum(0) / count[0]
        if bool(rest.abs().max() <= noise * (1 + logits.abs().max())):
            return scale, None
        return scale, rest

    def _affine(self, values: Tensor) -> Tensor:
        values = values * self.scale if self.scale != 1 else values
        return values if self._offset is None else values + self._offset.to(values.device)

    def bounded(self, values: Tensor) -> Tensor:
        """Logits with the soft cap, if there is one."""
        return values if self.cap is None else self.cap * torch.tanh(values / self.cap)

    def __deepcopy__(self, memo: dict[int, Any]) -> TargetHead:
        """Itself: the weights are the target's and are never changed."""
        return self


def _first(settings: Any, names: Sequence[str]) -> float | None:
    found = [getattr(settings, name, None) for name in names]
    return next((float(value) for value in found if value), None)
