"""Check the configuration of a model or tokenizer before transformers reads it.

transformers trusts these files. Some values would make it divide by zero, allocate terabytes, open
another file or fetch a kernel from the hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from fusion_detox.config import check_number
from fusion_detox.errors import ConfigError, ModelError

_MAX_INT = (1 << 31) - 1
_MAX_TOKENS = 1 << 24
"""Tables of tokens have one entry for each id, used or not."""

_COUNTS = re.compile(
    r"(hidden_size|n_embd|d_model|n_inner|(moe_|shared_expert_)?intermediate_size|ffn_dim|d_ff"
    r"|(num_hidden|n|num|decoder)_layers?|(num_attention|num_key_value|n|num)_heads?|head_dim"
    r"|vocab_size|max_position_embeddings|n_positions|n_ctx)"
)
_SHARES = re.compile(r".*(dropout|_pdrop|dropout_prob|partial_rotary_factor)")
_SMALL = re.compile(r".*(_eps|_epsilon|_theta|initializer_range)")
_ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function", "activation", "act_fn"}
_DTYPES = {"float32", "bfloat16", "float16", "float64"}
_IMPLEMENTATIONS = {
    *("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
    *("batched_mm", "grouped_mm"),
}
_TOKENIZER_TYPES: tuple[tuple[re.Pattern[str], tuple[type, ...], str], ...] = (
    (re.compile(r"(add|clean|split|strip)_.*|legacy|do_lower_case"), (bool,), "true or false"),
    (re.compile(r".*_token"), (str, dict, bool), "a token"),
    (re.compile(r"(padding|truncation)_side"), (str,), "a string"),
    (re.compile(r"model_input_names"), (list,), "a list"),
)
# They change how weights are read, or name other files.
_FORBIDDEN = {"quantization_config", "compression_config", "transformers_weights"}
_REMEDY = (
    "If you edited the file, or the `config` of the model that was saved, correct it; otherwise "
    "copy the file again from its source."
)


def check_model_config(values: Mapping[str, Any], source: Path) -> None:
    """Check the content of a ``config.json`` or ``generation_config.json``, at every level.

    Raises:
        ModelError: A size or count is not a positive number, a token id is outside the vocabulary,
            a rate is out of range, or a dtype, activation or attention implementation is unknown.
    """
    _check_level(values, source, values.get("vocab_size"))


def check_tokenizer(values: Mapping[str, Any], source: Path) -> None:
    """Check the ids in a ``tokenizer.json``.

    Raises:
        ModelError: An id is negative or far beyond any vocabulary, or is not a number.
    """
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    for text, id in vocabulary.items() if isinstance(vocabulary, Mapping) else ():
        _number(f"the id of {text!r}", id, source, 0, _MAX_TOKENS, whole=True)
    for token in _list(values.get("added_tokens")):
        if isinstance(token, Mapping):
            _number("the id of an added token", token.get("id"), source, 0, _MAX_TOKENS, whole=True)


def check_tokenizer_config(values: Mapping[str, Any], source: Path) -> None:
    """Check the content of a ``tokenizer_config.json``.

    Raises:
        ModelError: It names files to read, an added token has an impossible id, or a value has the
            wrong type.
    """
    for name, value in values.items():
        for pattern, types, what in _TOKENIZER_TYPES:
            if pattern.fullmatch(name) and not isinstance(value, (*types, type(None))):
                raise ModelError(
                    f"{source}: {name} must be {what}, but is {_shown(value)}. {_REMEDY}"
                )
        names_file = name.endswith(("_file", "_files")) or name in ("init_inputs", "auto_map")
        if names_file and value:
            raise ModelError(
                f"{source}: {name} must be absent, because it names other files or code to load, "
                f"but is {_shown(value)}. {_REMEDY}"
            )
    if values.get("model_max_length") is not None:
        _number("model_max_length", values["model_max_length"], source, 1, 10**40)
    added = values.get("added_tokens_decoder")
    for id in added if isinstance(added, Mapping) else ():
        number = int(id) if re.fullmatch(r"\d{1,18}", id) else id
        _number("an id in added_tokens_decoder", number, source, 0, _MAX_TOKENS, whole=True)


def _check_level(values: Mapping[str, Any], source: Path, vocabulary: object) -> None:
    size = values.get("vocab_size", vocabulary)
    top = size - 1 if type(size) is int and 0 < size <= _MAX_INT else _MAX_INT
    for name, value in values.items():
        if name in _FORBIDDEN and value:
            raise ModelError(f"{source}: {name} is not supported here. {_REMEDY}")
        if isinstance(value, Mapping):
            _check_level(value, source, size)
        elif name.endswith("_token_id"):
            low = -1 if name == "pad_token_id" else 0  # some Llamas have no padding, written as -1
            for id in _list(value):
                _number(name, id, source, low, top, whole=True)
        elif value is not None:
            _check_value(name, value, source)


def _check_value(name: str, value: object, source: Path) -> None:
    if _COUNTS.fullmatch(name):
        for count in _list(value):
            _number(name, count, source, 1, _MAX_INT, whole=True)
    elif _SHARES.fullmatch(name) or _SMALL.fullmatch(name):
        for number in _list(value):  # some families have one value for each layer
            _number(name, number, source, 0, 1 if _SHARES.fullmatch(name) else 1e12)
    elif name in _ACTIVATIONS:
        _choice(name, value, ACT2FN, source)
    elif name in ("dtype", "torch_dtype"):
        _choice(name, value, _DTYPES, source)
    elif name.endswith("_implementation"):
        _choice(name, value, _IMPLEMENTATIONS, source)


def _number(
    name: str, value: object, source: Path, low: float, high: float, *, whole: bool = False
) -> None:
    try:
        check_number(name, value, low, high, whole=whole)
    except ConfigError:
        kind = "whole number" if whole else "number"
        raise ModelError(
            f"{source}: {name} must be a {kind} from {low} to {high}, but is {_shown(value)}. "
            f"{_REMEDY}"
        ) from None


def _choice(name: str, value: object, known: Any, source: Path) -> None:
    if not isinstance(value, str) or value not in known:
        raise ModelError(
            f"{source}: {name} is {_shown(value)}, but must be one of {', '.join(sorted(known))}. "
            f"{_REMEDY}"
        )


def _list(value: object) -> list[Any]:
    """A list as it is; nothing for ``None``, and anything else as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
