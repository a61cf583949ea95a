"""The embeddings that an alignment compares, from a loaded model or from a model's files.

If they come from files, only one tensor is read, and only the file that holds it is downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fusion_detox.errors import AlignmentError, ModelError
from fusion_detox.files.adapters import refuse_adapter
from fusion_detox.files.hub import stay_local
from fusion_detox.files.loading_errors import explained, first_line
from fusion_detox.files.models import (
    check_causal,
    download,
    load_tokenizer,
    locate,
    quiet_transformers,
)
from fusion_detox.vocabulary.token_table import TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fusion_detox.alignment.config import Embeddings
    from fusion_detox.calibrator.calibrator import Calibrator

_HASHED_ROWS = 8192
_MAX_LISTED = 6
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_OTHER_NAMES: dict[Embeddings, tuple[str, ...]] = {
    "output": ("embed_out.weight", "lm_head.weight", "output.weight", "output_layer.weight"),
    "input": ("embed_in.weight", "embed_tokens.weight", "wte.weight", "tok_embeddings.weight"),
}
"""Names in files that are not the module's, such as that of GPT-NeoX's head in transformers 5."""


class EmbeddingTable(NamedTuple):
    """One embedding of a model, with the tokens that its rows belong to.

    Attributes:
        weight: ``(rows, width)``, in its stored dtype, on the CPU or the model's device.
        tokens: The bytes of each token.
        name: The model's name in messages.
    """

    weight: Tensor
    tokens: TokenTable
    name: str

    def fingerprint(self, kind: Embeddings) -> str:
        """Return the SHA-256 of the vocabulary and of the embedding rounded to bfloat16."""
        digest = hashlib.sha256(f"{kind} {tuple(self.weight.shape)} ".encode())
        for rows in torch.split(self.weight, _HASHED_ROWS):
            rounded = rows.to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
            digest.update(rounded.numpy().tobytes())
        digest.update(self.tokens.fingerprint().encode())
        return digest.hexdigest()


def calibrator_embeddings(calibrator: Calibrator, kind: Embeddings) -> EmbeddingTable:
    """Return the clean model's embeddings of the calibrator's vocabulary."""
    name = f"the calibrator {calibrator.name or 'given'}"
    weight = _weight(calibrator.clean, kind, name)[: calibrator.vocabulary_size]
    return EmbeddingTable(weight, calibrator.tokens, name)


def model_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: Embeddings
) -> EmbeddingTable:
    """Return the embeddings of a loaded model.

    Raises:
        AlignmentError: The model does not name them, or their weights are not in memory.
        ModelError: The model is not a causal language model.
        VocabularyError: The bytes of the tokenizer's tokens cannot be determined.
    """
    name = model.config.name_or_path or type(model).__name__
    check_causal(model.config, name)
    return EmbeddingTable(_weight(model, kind, name), TokenTable.from_tokenizer(tokenizer), name)


def checkpoint_embeddings(
    name_or_path: str | os.PathLike[str],
    kind: Embeddings,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> EmbeddingTable:
    """Read the embeddings of a model by folder or hub id, and no other tensor.

    Raises:
        AlignmentError: The files hold no such tensor, or it is quantised.
        ModelNotFoundError: The model was not found, or the hub cannot be reached.
        ModelError: The model is not a causal language model, or its files are damaged.
        VocabularyError: The bytes of the tokenizer's tokens cannot be determined.
    """
    refuse_adapter(name_or_path, "align")
    source = locate(name_or_path, "model", local_files_only=local_files_only)
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    with explained(source, "model", local_files_only):
        settings = AutoConfig.from_pretrained(
            source,
            trust_remote_code=False,
            local_files_only=stay_local(source, local_files_only),
            revision=revision or "main",
        )
    check_causal(settings, source)
    names, shape = _names_and_shape(settings, kind, source)
    if tokenizer is None:
        tokenizer = load_tokenizer(name_or_path, **options)
    weight = _read_tensor(source, names, shape, **options)
    return EmbeddingTable(weight, TokenTable.from_tokenizer(tokenizer), str(name_or_path))


def _weight(model: PreTrainedModel, kind: Embeddings, name: str) -> Tensor:
    weight = getattr(_layer(model, kind), "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        state = "does not name its" if weight is None else "holds no unquantised weights of its"
        raise AlignmentError(
            f"{name} {state} {kind} embeddings, so it cannot be aligned: give the folder or hub id "
            "of a complete model instead"
        )
    return weight.detach()


def _layer(model: PreTrainedModel, kind: Embeddings) -> Any:
    untyped: Any = model
    return untyped.get_output_embeddings() if kind == "output" else untyped.get_input_embeddings()


def _names_and_shape(
    settings: PretrainedConfig, kind: Embeddings, source: str
) -> tuple[list[str], tuple[int, int]]:
    """Possible names of the tensor in files, the likeliest first, and its shape."""
    with explained(source, "model", local_files_only=True), quiet_transformers():
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):  # allocates no weights
            model = auto.from_config(settings, trust_remote_code=False)
    kinds: list[Embeddings] = [kind]
    if kind == "output" and getattr(settings.get_text_config(), "tie_word_embeddings", False):
        kinds = ["input", "output"]
    names: list[str] = []
    shape: tuple[int, int] | None = None
    for one in kinds:
        layer = _layer(model, one)
        path = next((path for path, part in model.named_modules() if part is layer), None)
        if layer is None or path is None or not hasattr(layer, "weight"):
            continue
        prefix = f"{model.base_model_prefix}."
        names += [f"{path}.weight", f"{path.removeprefix(prefix)}.weight", f"{prefix}{path}.weight"]
        rows, width = layer.weight.shape
        shape = shape or (rows, width)
    if shape is None:
        raise AlignmentError(
            f"{source}: models of type {settings.model_type!r} do not name their {kind} "
            "embeddings, so this one cannot be aligned; use the contrast rule, which needs no "
            "alignment"
        )
    for one in kinds:
        names += _OTHER_NAMES[one]
    return list(dict.fromkeys(names)), shape


def _read_tensor(
    source: str,
    names: list[str],
    shape: tuple[int, int],
    *,
    revision: str | None,
    local_files_only: bool,
) -> Tensor:
    """Read the first of ``names`` that the files hold, or else the only one with a similar name."""

    def folder_with(file: str) -> Path:
        if Path(source).is_dir():
            return Path(source)
        return download(source, [file], revision=revision, local_files_only=local_files_only)

    files = _weight_map(folder_with(_INDEX) / _INDEX)
    if files is None:
        path = folder_with(_SINGLE) / _SINGLE
        if not path.is_file():
            raise ModelError(
                f"{source} holds neither {_INDEX} nor {_SINGLE}. Only safetensors are read: save "
                "the model again with save_pretrained, on a machine where you trust its files"
            )
        with _open(path) as tensors:
            files = dict.fromkeys(tensors.keys(), _SINGLE)
    name = next((name for name in names if name in files), None) or _same_ending(files, names)
    if name is None:
        similar = sorted(one for one in files if re.search("embed|wte|head|output", one))
        raise AlignmentError(
            f"{source} holds no tensor {' or '.join(names[:2])} for the embeddings; it holds "
            f"{len(files)} tensors, such as {', '.join(similar[:_MAX_LISTED]) or 'none'}. Give a "
            "complete model, or load it and pass the model itself"
        )
    path = folder_with(files[name]) / files[name]
    with _open(path) as tensors:
        if name not in tensors.keys():  # noqa: SIM118 - not a dictionary
            raise ModelError(
                f"{path} lacks the tensor {name}, which {_INDEX} lists; download the files again"
            )
        found = list(tensors.get_slice(name).get_shape())
        if found != list(shape):
            raise AlignmentError(
                f"{source}: the tensor {name} has the shape {found}, but config.json says "
                f"{list(shape)}: the files belong to different models; download them again"
            )
        tensor: Tensor = tensors.get_tensor(name)
    if not tensor.is_floating_point():
        raise AlignmentError(
            f"{source}: the tensor {name} is stored as {tensor.dtype}, so the model is quantised: "
            "align with the original model"
        )
    return tensor


def _weight_map(path: Path) -> dict[str, str] | None:
    """The file of each tensor according to the index, or ``None`` without an index."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {first_line(error)}; download it again") from error
    outside = [file for file in files.values() if Path(file).name != file]
    if outside:
        raise ModelError(f"{path} points outside its folder: {outside[0]!r}; download it again")
    return files


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing, but {_INDEX} lists it; download it again") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is truncated or not a safetensors file: {first_line(error)}; download it again"
        ) from error


def _same_ending(files: dict[str, str], names: list[str]) -> str | None:
    """The only tensor with the last two parts of a name; checkpoints may use other prefixes."""
    for name in names:
        end = "." + ".".join(name.split(".")[-2:])
        found = [candidate for candidate in files if f".{candidate}".endswith(end)]
        if len(found) == 1:
            return found[0]
    return None
