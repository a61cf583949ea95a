"""Runs any full-attention causal language model through the public API of ``transformers``."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fusion_detox.decoding.decoder import Decoder
from fusion_detox.decoding.head_inputs import head_inputs
from fusion_detox.decoding.kv_cache import Row, SlotStore
from fusion_detox.errors import ModelError
from fusion_detox.files.models import logits_width

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
_REMEDY = "use a full-attention model such as GPT-2 or Llama as the calibrator"
# Rows that ask for more distinct positions than this are run in two passes.
_MAX_OFFSETS = 8


class GenericDecoder(Decoder):
    """One forward pass per model, over a cache that is assembled from the slots.

    Rows of different lengths are padded at the end to share the cache. The attention mask hides the
    padding and explicit positions skip it. A model that uses a token's column as its position (MPT)
    runs rows of one length at a time.

    Args:
        models: One model, or two that read the same text.
        context_length: Longest text in tokens.
        device: Where to run. A model on another device, or in half precision for a CPU, is copied;
            the caller's model is not changed.

    Raises:
        ModelError: A model's cache cannot be rolled back and continued, or the model has fewer
            positions than ``context_length``.
    """

    def __init__(
        self, models: Sequence[PreTrainedModel], context_length: int, device: torch.device
    ) -> None:
        check_configurations(models, context_length)
        self.distributions = len(models)
        self._models = [_CachedModel(given, context_length, device) for given in models]
        for model in self._models:
            model.check_numbers()

    def resize(self, slots: int) -> None:  # noqa: D102 - inherited
        for model in self._models:
            model.store.resize(slots)

    def copy(self, source: int, target: int, start: int, stop: int) -> None:  # noqa: D102
        for model in self._models:
            model.store.copy(source, target, start, stop)

    def logits(self, rows: Sequence[Row]) -> Tensor:  # noqa: D102
        rows = self._split(rows)
        return torch.stack([model.forward(rows) for model in self._models])

    def hidden(self, rows: Sequence[Row]) -> Tensor:  # noqa: D102
        rows = self._split(rows)
        return torch.stack([model.forward(rows, hidden=True) for model in self._models])

    def _split(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Returns rows that ask for few distinct offsets, after running the tokens before those."""
        if len({offset for row in rows for offset in row.asked}) > _MAX_OFFSETS:
            # The head runs at the same offsets of all rows, so run what comes before them first.
            before = [row._replace(tokens=row.tokens[: row.asked[0]], asked=()) for row in rows]
            before = [row for row in before if row.tokens]
            for model in self._models:
                model.forward(before)
            rows = [_rest(row) for row in rows]
        return rows


class _CachedModel:
    """A model and the slots of its keys and values."""

    def __init__(self, model: PreTrainedModel, context_length: int, device: torch.device) -> None:
        self._device = device
        self._model = _placed(model, device)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._slices_logits = "logits_to_keep" in parameters
        self._skips_padding = True
        self.store = _empty_store(self._model, context_length, device)

    def forward(self, rows: Sequence[Row], *, hidden: bool = False) -> Tensor:
        """``(asked, vocab)`` logits, or hidden states; stores the new columns in the slots."""
        if self._skips_padding:
            return self._forward(rows, hidden)
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.start, []).append(row)
        found: dict[int, Tensor] = {}
        for group in groups.values():
            counts = [len(row.asked) for row in group]
            logits = torch.split(self._forward(group, hidden), counts)
            found.update(zip([row.slot for row in group], logits, strict=True))
        return torch.cat([found[row.slot] for row in rows])

    def _forward(self, rows: Sequence[Row], hidden: bool) -> Tensor:
        held = max(row.start for row in rows)
        width = max(len(row.tokens) for row in rows)
        offsets = sorted({offset for row in rows for offset in row.asked})
        ids, positions, mask = [], [], []
        for row in rows:
            filler = width - len(row.tokens)
            # Fillers come after the row's tokens, so they attend to something and stay finite.
            ids.append([*row.tokens, *(row.tokens[-1:] * filler)])
            positions.append([*range(row.start, row.stop), *([row.stop - 1] * filler)])
            gap = held - row.start
            mask.append([1] * row.start + [0] * gap + [1] * len(row.tokens) + [0] * filler)
        arguments: dict[str, Any] = {}
        if self._takes_positions:
            arguments["position_ids"] = self._tensor(positions)
        if self._slices_logits:
            arguments["logits_to_keep"] = self._tensor(offsets or [0])
        cache = self._cache(rows, held)
        with contextlib.ExitStack() as stack:
            seen = stack.enter_context(head_inputs(self._model)) if hidden else []
            output = self._model(
                input_ids=self._tensor(ids),
                attention_mask=self._tensor(mask),
                past_key_values=cache,
                use_cache=True,
                **arguments,
            )
        self._keep(cache, rows, held)
        place = {offset: index for index, offset in enumerate(offsets)}
        if not self._slices_logits:
            place = {offset: offset for offset in offsets}
        asked = [(i, place[offset]) for i, row in enumerate(rows) for offset in row.asked]
        chosen = self._tensor(asked).view(-1, 2)
        found: Tensor = seen[-1] if hidden else output.logits
        return found[chosen[:, 0], chosen[:, 1]]

    def _cache(self, rows: Sequence[Row], held: int) -> DynamicCache:
        """The slots' leading columns, side by side."""
        cache = DynamicCache()
        slots = self._tensor([row.slot for row in rows])
        if held:
            pairs = zip(self.store.keys, self.store.values, strict=True)
            for layer, pair in enumerate(pairs):
                keys, values = (t[:, :held].index_select(0, slots).transpose(1, 2) for t in pair)
                cache.update(keys, values, layer)
        return cache

    def _keep(self, cache: DynamicCache, rows: Sequence[Row], held: int) -> None:
        """Stores the columns that a forward pass added, without fillers."""
        self.store.reserve(max(row.stop for row in rows))
        columns = self.store.columns
        where: list[int] = []
        index: list[int] = []
        token: list[int] = []
        for i, row in enumerate(rows):
            where += range(row.slot * columns + row.start, row.slot * columns + row.stop)
            index += [i] * len(row.tokens)
            token += range(len(row.tokens))
        target, source = self._tensor(where), (self._tensor(index), self._tensor(token))
        for layer, pair in enumerate(_columns(cache)):
            keys, values = (t[:, :, held:].transpose(1, 2) for t in pair)
            self.store.write(layer, target, keys[source], values[source])

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)

    def check_numbers(self) -> None:
        """Finds a way to run rows of different lengths that matches runs without a cache.

        Raises:
            ModelError: There is none.
        """
        error = self._error()
        if error > 1:
            self._skips_padding = False
            error = self._error()
        if error > 1:
            raise ModelError(
                f"{type(self._model).__name__} cannot serve as a calibrator: its results with and "
                f"without a cache differ ({error:.2g} times what rounding explains); {_REMEDY}"
            )

    def _error(self) -> float:
        """Largest deviation for a text of full length and a short one, in units of the tolerance.

        Both are continued from a cache; the short one is rolled back first.
        """
        model, longest = self._model, self.store.longest
        known = min(50, logits_width(model))
        lengths, kept = [longest, min(5, longest)], [longest - 1, max(1, min(5, longest) - 3)]
        texts = [tuple((3 + 7 * i + n) % known for i in range(n)) for n in lengths]
        self.store.resize(2)
        self.forward([Row(i, 0, text, ()) for i, text in enumerate(texts)])
        ends = [text[start:] for text, start in zip(texts, kept, strict=True)]
        found = self.forward([Row(i, kept[i], ends[i], (len(ends[i]) - 1,)) for i in (0, 1)])
        self.store.resize(0)
        tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
        worst = 0.0
        for row, text in zip(found.float(), texts, strict=True):
            whole = model(input_ids=self._tensor([text]), use_cache=False).logits[0, -1].float()
            deviation = (row - whole).abs().max() / (tolerance * (1 + whole.abs().max()))
            # Comparisons with NaN are false, so a NaN would pass.
            worst = max(worst, float(deviation.detach().nan_to_num(torch.inf)))
        return worst


def _rest(row: Row) -> Row:
    """What is left of a row once the tokens before its first asked position have run."""
    fed = row.asked[0]
    asked = tuple(offset - fed for offset in row.asked)
    return Row(row.slot, row.start + fed, row.tokens[fed:], asked)


def _placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    half = model.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half and device.type == "cpu" else model.dtype
    if model.device == device and model.dtype == dtype and not model.training:
        return model
    placed: Any = copy.deepcopy(model)
    moved: PreTrainedModel = placed.to(device=device, dtype=dtype).eval()
    return moved


def _columns(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, ``(rows, heads, columns, head_dim)``."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _empty_store(model: PreTrainedModel, context_length: int, device: torch.device) -> SlotStore:
    """An empty store shaped like the model's cache."""
    cache = DynamicCache()
    try:
        model(
            input_ids=torch.tensor([[1, 0]], device=device), past_key_values=cache, use_cache=True
        )
        held = _columns(cache)
        fits = bool(held) and all(tensor.shape[-2] == 2 for pair in held for tensor in pair)
    except Exception as error:  # models fail in many ways on an unfamiliar cache
        raise ModelError(
            f"{type(model).__name__} cannot serve as a calibrator: it does not run on a plain "
            f"key-value cache ({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
    if not fits:
        raise ModelError(
            f"{type(model).__name__} cannot serve as a calibrator: its state is not one column of "
            f"keys and values per token, so it cannot be rolled back; {_REMEDY}"
        )
    shapes = [((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in held]
    return SlotStore(shapes, context_length, device, held[0][0].dtype)


def check_configurations(models: Sequence[PreTrainedModel], context_length: int) -> None:
    """Refuses models whose configuration shows that they cannot serve; no model is run.

    Raises:
        ModelError: A model's cache cannot be rolled back, or is too short for the context.
    """
    for model in models:
        _check_configuration(model, context_length)


def _check_configuration(model: PreTrainedModel, context_length: int) -> None:
    name = type(model).__name__
    whole = model.config
    config = whole.get_text_config(decoder=True)
    if whole.is_encoder_decoder:
        raise ModelError(
            f"{name} cannot serve as a calibrator: it is an encoder-decoder; {_REMEDY}"
        )
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{name} cannot serve as a calibrator: it has no key-value cache, and a recurrent "
            f"state cannot be rolled back; {_REMEDY}"
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - _ATTENTIONS
    if unknown:
        raise ModelError(
            f"{name} cannot serve as a calibrator: its layers of type {', '.join(sorted(unknown))} "
            f"cannot be rolled back; {_REMEDY}"
        )
    # Padding inside the cache puts up to twice the text's length between two tokens.
    for setting in ("sliding_window", "attention_chunk_size", "window_size"):
        window = getattr(config, setting, None)
        used = getattr(config, "use_sliding_window", True) is not False
        if setting == "window_size":  # of GPT-Neo's local layers
            used = "local" in (getattr(config, "attention_layers", None) or ())
        if window is not None and used and window < 2 * context_length:
            raise ModelError(
                f"{name} cannot serve as a calibrator: its {setting} of {window} is less than "
                f"twice the calibrator's context_length of {context_length}; choose a "
                f"context_length of at most {window // 2}"
            )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < context_length:
        raise ModelError(
            f"{name} has {positions} positions, fewer than the calibrator's context_length of "
            f"{context_length}; choose a context_length of at most {positions}"
        )
