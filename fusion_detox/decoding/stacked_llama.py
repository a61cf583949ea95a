"""Runs two Llamas of one shape in a single forward pass, on weights stacked along a new axis.

Models that differ only in their output layers share the pass through all other layers.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.activations import ACT2FN

from fusion_detox.decoding.decoder import Decoder
from fusion_detox.decoding.kv_cache import Row, SlotStore
from fusion_detox.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The weights are copied; for larger models, the time saved is not worth the memory.
_HEAD_COLUMNS = 2048
_MAX_PARAMETERS = 250_000_000
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
)


class _Layer(NamedTuple):
    """Weights ``(trunks, in, out)`` and biases ``(trunks, 1, out)`` of a layer.

    The scales of the norms are multiplied into the weights that follow them.
    """

    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class _Layout(NamedTuple):
    """Positions of a ragged batch's tokens; everything but attention runs on packed tokens."""

    ids: Tensor  # (tokens,)
    columns: Tensor  # (tokens,) positions
    where: Tensor  # (tokens,) slot * columns + column
    asked: Tensor  # (asked,) tokens whose next token is asked for
    length: int  # columns that the attention reads
    slots: slice | Tensor  # of the rows, including fillers
    rows: int
    width: int  # tokens of the longest row
    gather: Tensor | None  # (rows * width,) token in each place; None if all are in order
    back: Tensor | None  # (tokens,) place of each token
    mask: Tensor | None  # (rows, 1, groups * width, length), added to the attention's scores


class StackedLlamaDecoder(Decoder):
    """Runs the clean and the reference model as one, with their attention heads side by side.

    The numbers are those of ``LlamaForCausalLM`` up to rounding. The weights are copied once, at
    construction; later changes to the models have no effect. Decoders with equal weights on one
    device share a copy. On a CPU, half precision is converted to float32.

    Args:
        models: One or two models that ``supports`` accepts.
        context_length: Longest text in tokens.
        vocabulary_size: Number of logits to compute.
        device: Where to run; the models may be elsewhere.

    Raises:
        ModelError: The models have fewer positions than ``context_length``.
    """

    @staticmethod
    def supports(models: Sequence[PreTrainedModel]) -> bool:
        """Whether the models are plain Llamas of one shape with unscaled rotary positions."""
        if not all(type(model) is LlamaForCausalLM for model in models):
            return False
        first = models[0].config
        for model in models:
            config = model.config
            same = all(getattr(config, name) == getattr(first, name) for name in _SAME)
            same &= _head_dim(config) == _head_dim(first) and _rope(config) == _rope(first)
            if not same or _rope(config)[0] != "default":
                return False
            state = model.state_dict()
            if set(state) - _expected(config) or state.keys() != models[0].state_dict().keys():
                return False  # quantised, or with adapters
            floating = all(tensor.is_floating_point() for tensor in state.values())
            if not floating or model.dtype != models[0].dtype:
                return False
        return sum(p.numel() for p in models[0].parameters()) <= _MAX_PARAMETERS

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        context_length: int,
        vocabulary_size: int,
        device: torch.device,
    ) -> None:
        config = models[0].config
        if config.max_position_embeddings < context_length:
            raise ModelError(
                f"the models have {config.max_position_embeddings} positions, fewer than the "
                f"calibrator's context_length of {context_length}; choose a context_length of "
                f"at most {config.max_position_embeddings}"
            )
        self.distributions = len(models)
        self._device = device
        half = device.type == "cpu" and models[0].dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half else models[0].dtype
        self._heads = config.num_attention_heads
        self._key_heads = config.num_key_value_heads
        self._head_dim = _head_dim(config)
        self._epsilon = config.rms_norm_eps
        self._activation = ACT2FN[config.hidden_act]
        weights = _Weights(models[:1] if _share_trunk(models) else models, device, dtype)
        trunks = len(weights)
        self._embeddings = _shared(weights.stack("model.embed_tokens.weight").to(dtype))
        self._layers = [weights.layer(index) for index in range(config.num_hidden_layers)]
        heads = _Weights(models, device, dtype)
        head = heads.joined("", ["lm_head"], norm="model.norm")[:, :, :vocabulary_size]
        # A CPU multiplies a few rows by a wide matrix faster in parts that fit its cache.
        width = _HEAD_COLUMNS if device.type == "cpu" else vocabulary_size
        head = F.pad(head, (0, -vocabulary_size % width))
        head = head.view(len(heads), head.shape[1], -1, width)
        self._head = _shared(head.transpose(1, 2).contiguous())  # (models, parts, in, width)
        self._vocabulary_size = vocabulary_size
        self._logits = head.new_empty(0)
        self._scale = weights.stack("model.norm.weight").to(dtype)[:, None]
        theta = torch.tensor(_rope(config)[1], dtype=torch.float32)
        exponents = torch.arange(0, self._head_dim, 2).float() / self._head_dim
        angles = torch.arange(context_length).float()[:, None] / theta**exponents
        cosine, sine = angles.cos(), angles.sin()
        # (columns, 1, head_dim); the sign of the sine is that of rotation by halves.
        self._cosine = torch.cat([cosine, cosine], -1)[:, None].to(device, dtype)
        self._sine = torch.cat([-sine, sine], -1)[:, None].to(device, dtype)
        shape = (trunks * self._key_heads, self._head_dim)
        shapes = [(shape, shape)] * config.num_hidden_layers
        self._store = SlotStore(shapes, context_length, device, dtype)

    def resize(self, slots: int) -> None:  # noqa: D102
        self._store.resize(slots)
        if not slots:
            self._logits = self._logits.new_empty(0)

    def copy(self, source: int, target: int, start: int, stop: int) -> None:  # noqa: D102
        self._store.copy(source, target, start, stop)

    def logits(self, rows: Sequence[Row]) -> Tensor:  # noqa: D102
        logits: Tensor
        normed = self._normed(rows).expand(self.distributions, -1, -1)
        models, parts, inputs, width = self._head.shape
        asked = normed.shape[1]
        if asked == 1 or parts == 1:
            repeated = normed[:, None].expand(-1, parts, -1, -1).reshape(-1, asked, inputs)
            logits = torch.bmm(repeated, self._head.flatten(0, 1)).view(models, asked, -1)
            return logits[..., : self._vocabulary_size]
        shape = (models, asked, parts * width)
        if self._logits.numel() < math.prod(shape):
            # Memory that is used again needs not be cleared by the system for each step.
            self._logits = normed.new_empty(math.prod(shape))
        logits = self._logits[: math.prod(shape)].view(shape)
        for own, result, head in zip(normed, logits, self._head, strict=True):
            for part, columns in zip(head, torch.split(result, width, -1), strict=True):
                torch.mm(own, part, out=columns)
        return logits[..., : self._vocabulary_size]

    def hidden(self, rows: Sequence[Row]) -> Tensor:  # noqa: D102
        return (self._normed(rows) * self._scale).expand(self.distributions, -1, -1)

    def _normed(self, rows: Sequence[Row]) -> Tensor:
        """``(trunks, asked, width)`` without the final norm's scale, which is part of the head."""
        at = self._layout(rows)
        hidden = self._embeddings.index_select(1, at.ids)  # (trunks, tokens, width)
        size = (hidden.shape[-1],)
        cosine, sine = self._cosine[at.columns], self._sine[at.columns]
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, size, None, self._epsilon)
            qkv = _affine(normed, layer.qkv, layer.qkv_bias)
            attended = self._attention(index, qkv, at, cosine, sine)
            if index == last:
                attended, hidden = attended[:, at.asked], hidden[:, at.asked]
            if layer.out_bias is not None:
                hidden = hidden + layer.out_bias
            hidden = torch.baddbmm(hidden, attended, layer.out)
            normed = F.rms_norm(hidden, size, None, self._epsilon)
            gate, up = _affine(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            if layer.down_bias is not None:
                hidden = hidden + layer.down_bias
            hidden = torch.baddbmm(hidden, self._activation(gate) * up, layer.down)
        return F.rms_norm(hidden, size, None, self._epsilon)

    def _attention(
        self, layer: int, qkv: Tensor, at: _Layout, cosine: Tensor, sine: Tensor
    ) -> Tensor:
        """``(trunks, tokens, heads * head_dim)``; stores the new keys and values."""
        trunks, tokens, _ = qkv.shape
        heads, dim = self._key_heads, self._head_dim
        groups = self._heads // heads
        qkv = qkv.view(trunks, tokens, -1, dim)
        turned, values = torch.split(qkv, [self._heads + heads, heads], 2)
        swapped = turned.view(*turned.shape[:-1], 2, dim // 2).flip(-2).flatten(-2)
        turned = (turned * cosine).addcmul_(swapped, sine)
        queries, keys = torch.split(turned, [self._heads, heads], 2)
        self._store.write(
            layer,
            at.where,
            keys.transpose(0, 1).flatten(1, 2),
            values.transpose(0, 1).flatten(1, 2),
        )
        if at.gather is not None:
            queries = queries.index_select(1, at.gather)
        # Query heads that share a key head become additional queries of that head.
        queries = queries.reshape(trunks, at.rows, at.width, heads, groups, dim)
        queries = queries.permute(1, 0, 3, 4, 2, 5).reshape(at.rows, trunks * heads, -1, dim)
        result = F.scaled_dot_product_attention(
            queries,
            _columns(self._store.keys[layer], at),
            _columns(self._store.values[layer], at),
            attn_mask=at.mask,
        )
        result = result.view(at.rows, trunks, heads, groups, at.width, dim)
        result = result.permute(1, 0, 4, 2, 3, 5).reshape(trunks, at.rows * at.width, -1)
        return result if at.back is None else result.index_select(1, at.back)

    def _layout(self, rows: Sequence[Row]) -> _Layout:
        self._store.reserve(max(row.stop for row in rows))
        columns = self._store.columns
        width = max(len(row.tokens) for row in rows)
        length = max(row.stop for row in rows)
        low, high = min(row.slot for row in rows), max(row.slot for row in rows) + 1
        # Idle slots in between cost less than gathering keys and values.
        dense = high - low <= len(rows) + len(rows) // 2 + 1
        count = high - low if dense else len(rows)
        place = [row.slot - low if dense else index for index, row in enumerate(rows)]
        ids: list[int] = []
        positions: list[int] = []
        where: list[int] = []
        asked: list[int] = []
        back: list[int] = []
        gather, first = [0] * (count * width), [0] * count
        for index, row in zip(place, rows, strict=True):
            tokens, start = len(ids), index * width
            ids += row.tokens
            positions += range(row.start, row.stop)
            where += range(row.slot * columns + row.start, row.slot * columns + row.stop)
            asked += [tokens + offset for offset in row.asked]
            back += range(start, start + len(row.tokens))
            gather[start : start + len(row.tokens)] = range(tokens, len(ids))
            first[index] = row.start
        chosen = [] if dense else [row.slot for row in rows]
        lists = (ids, positions, where, asked, back, gather, first, chosen)
        # A single copy to the device.
        together = torch.tensor([value for values in lists for value in values], device="cpu")
        parts = torch.split(together.to(self._device), [len(values) for values in lists])
        in_order = gather == list(range(len(ids)))
        even = count == len(rows) and all(row.start + width == length for row in rows)
        return _Layout(
            ids=parts[0],
            columns=parts[1],
            where=parts[2],
            asked=parts[3],
            length=length,
            slots=slice(low, high) if dense else parts[7],
            rows=count,
            width=width,
            gather=None if in_order else parts[5],
            back=None if in_order else parts[4],
            mask=None if even and width == 1 else self._mask(parts[6], width, length),
        )

    def _mask(self, first: Tensor, width: int, length: int) -> Tensor:
        """Lets each query attend to the columns up to its own."""
        columns = torch.arange(length, device=self._device)
        hidden = columns > (first[:, None] + columns[:width])[:, :, None]
        mask = torch.zeros(hidden.shape, device=self._device, dtype=self._cosine.dtype)
        mask.masked_fill_(hidden, float("-inf"))
        return mask.repeat(1, self._heads // self._key_heads, 1)[:, None]


class _Weights:
    """Stacks the models' weights by their names in the saved format."""

    def __init__(
        self, models: Sequence[PreTrainedModel], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._states = [model.state_dict() for model in models]
        self._device, self._dtype = device, dtype

    def __len__(self) -> int:
        return len(self._states)

    def stack(self, name: str) -> Tensor:
        """``(models, ...)``, in float32."""
        return torch.stack([state[name].to(self._device).float() for state in self._states])

    def joined(self, place: str, names: list[str], norm: str | None = None) -> Tensor:
        """Linear maps side by side, ``(models, in, out)``, times the preceding norm's scale."""
        joined = torch.cat([self.stack(f"{place}{name}.weight") for name in names], 1)
        joined = joined.transpose(1, 2)
        if norm is not None:
            joined = joined * self.stack(f"{norm}.weight")[:, :, None]
        return _shared(joined.to(self._dtype).contiguous())

    def biases(self, place: str, names: list[str]) -> Tensor | None:
        """Their biases side by side, ``(models, 1, out)``, if they have any."""
        if f"{place}{names[0]}.bias" not in self._states[0]:
            return None
        joined = torch.cat([self.stack(f"{place}{name}.bias") for name in names], 1)
        return _shared(joined[:, None].to(self._dtype).contiguous())

    def layer(self, index: int) -> _Layer:
        """All weights of a layer."""
        place = f"model.layers.{index}."
        attention, mlp = f"{place}self_attn.", f"{place}mlp."
        qkv, gate_up = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
        return _Layer(
            qkv=self.joined(attention, qkv, norm=f"{place}input_layernorm"),
            qkv_bias=self.biases(attention, qkv),
            out=self.joined(attention, ["o_proj"]),
            out_bias=self.biases(attention, ["o_proj"]),
            gate_up=self.joined(mlp, gate_up, norm=f"{place}post_attention_layernorm"),
            gate_up_bias=self.biases(mlp, gate_up),
            down=self.joined(mlp, ["down_proj"]),
            down_bias=self.biases(mlp, ["down_proj"]),
        )


_weights: weakref.WeakValueDictionary[tuple[object, ...], Tensor] = weakref.WeakValueDictionary()
_weights_lock = threading.Lock()


def _shared(tensor: Tensor) -> Tensor:
    """An equal tensor that another decoder still holds, or else this one."""
    device = str(tensor.device)
    key = (tensor.dtype, device, *tensor.shape, *tensor.flatten()[:8].tolist())
    with _weights_lock:
        held = _weights.get(key)
        if held is not None and torch.equal(held, tensor):
            return held
        _weights[key] = tensor
        return tensor


def _share_trunk(models: Sequence[PreTrainedModel]) -> bool:
    """Whether all weights but those of the output layers are equal."""
    first = models[0].state_dict()
    return all(
        name == "lm_head.weight" or torch.equal(tensor.to(first[name].device), first[name])
        for model in models[1:]
        for name, tensor in model.state_dict().items()
    )


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(inputs, weight) if bias is None else torch.baddbmm(bias, inputs, weight)


def _columns(tensor: Tensor, at: _Layout) -> Tensor:
    """``(rows, heads, length, head_dim)``, without a copy if the slots are contiguous."""
    held = tensor[:, : at.length]
    held = held[at.slots] if isinstance(at.slots, slice) else held.index_select(0, at.slots)
    return held.transpose(1, 2)


def _head_dim(config: Any) -> int:
    given: int | None = getattr(config, "head_dim", None)
    return given or int(config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> tuple[str, float]:
    """Kind and base of the rotary positions, under the names of transformers 4 or 5."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    settings = settings or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    base: Any = settings.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    return str(kind), float(base)


def _expected(config: Any) -> set[str]:
    """Names of all tensors that a plain Llama can have."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    linear = [f"self_attn.{part}_proj" for part in "qkvo"]
    linear += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    for index in range(config.num_hidden_layers):
        place = f"model.layers.{index}."
        norms = ("input_layernorm", "post_attention_layernorm")
        names |= {f"{place}{norm}.weight" for norm in norms}
        names |= {f"{place}{name}.{kind}" for name in linear for kind in ("weight", "bias")}
    return names
