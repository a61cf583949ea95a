"""The embeddings that an alignment compares: of a model, or of its files, one tensor alone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fusion_detox.alignment.checkpoint_tensors import read_tensor
from fusion_detox.errors import AlignmentError
from fusion_detox.files.loading_errors import explained
from fusion_detox.files.models import check_causal, load_tokenizer, locate, quiet_transformers
from fusion_detox.vocabulary.token_table import TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fusion_detox.alignment.config import Embeddings
    from fusion_detox.calibrator.calibrator import Calibrator

_ROWS = 8192


_ELSEWHERE: dict[Embeddings, tuple[str, ...]] = {
    "output": ("embed_out.weight", "lm_head.weight", "output.weight", "output_layer.weight"),
    "input": ("embed_in.weight", "embed_tokens.weight", "wte.weight", "tok_embeddings.weight"),
}
"""Names in files that differ from the module's, as GPT-NeoX's output layer since transformers 5."""


class EmbeddingTable(NamedTuple):
    """One embedding of a model, with the tokens that its rows stand for.

    Attributes:
        weight: ``(rows, width)``, in the dtype that it is stored in, on the CPU or the model's
            device.
        tokens: The bytes of each token.
        name: The model, as messages call it.
    """

    weight: Tensor
    tokens: TokenTable
    name: str

    def fingerprint(self, kind: Embeddings) -> str:
        """SHA-256 over the embedding, rounded to bfloat16, and the vocabulary."""
        digest = hashlib.sha256(f"{kind} {tuple(self.weight.shape)} ".encode())
        for start in range(0, len(self.weight), _ROWS):
            rounded = (
                self.weight[start : start + _ROWS]
                .to("cpu", torch.bfloat16)
                .contiguous()
                .view(torch.uint8)
            )
            digest.update(rounded.numpy().tobytes())
        digest.update(self.tokens.fingerprint().encode())
        return digest.hexdigest()


def of_calibrator(calibrator: Calibrator, kind: Embeddings) -> EmbeddingTable:
    """The clean model's embedding, cut to the tokens that it judges."""
    name = f"the calibrator {calibrator.name or 'given'}"
    weight = _of_model(calibrator.clean, kind, name)[: calibrator.vocabulary_size]
    return EmbeddingTable(weight, calibrator.tokens, name)


def of_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: Embeddings
) -> EmbeddingTable:
    """A loaded model's embedding.

    Raises:
        AlignmentError: It names none, or its weights are not here.
        ModelError: It is no causal language model.
        VocabularyError: The bytes of the tokenizer's tokens cannot be found out.
    """
    name = model.config.name_or_path or type(model).__name__
    check_causal(model.config, name)
    return EmbeddingTable(_of_model(model, kind, name), TokenTable.from_tokenizer(tokenizer), name)


def of_files(
    name_or_path: str | os.PathLike[str],
    kind: Embeddings,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> EmbeddingTable:
    """The embedding of a model by path or hub id; no other tensor is read.

    Raises:
        AlignmentError: No tensor of its files is the embedding, or it is not stored as numbers.
        ModelNotFoundError: Nothing there, or the hub cannot be reached.
        ModelError: It is no causal language model, or its files are damaged.
        VocabularyError: The bytes of the tokenizer's tokens cannot be found out.
    """
    source = locate(name_or_path, "model")
    options: dict[str, Any] = {
        "trust_remote_code": False,
        "local_files_only": local_files_only or Path(source).is_dir(),
        "revision": revision or "main",
    }
    with explained(source, "model", local_files_only):
        settings = AutoConfig.from_pretrained(source, **options)
    check_causal(settings, source)
    names, shape = _names(settings, kind, source)
    if tokenizer is None:
        tokenizer = load_tokenizer(
            name_or_path, revision=revision, local_files_only=local_files_only
        )
    weight = read_tensor(source, names, shape, revision=revision, local_files_only=local_files_only)
    return EmbeddingTable(weight, TokenTable.from_tokenizer(tokenizer), str(name_or_path))


def _of_model(model: PreTrainedModel, kind: Embeddings, name: str) -> Tensor:
    module = _module(model, kind)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        state = "names none" if weight is None else "are not in memory as plain numbers"
        raise AlignmentError(
            f"{name}: the {kind} embeddings {state}, so nothing can be aligned with them; give "
            "the model's folder or hub id instead"
        )
    return weight.detach()


def _module(model: PreTrainedModel, kind: Embeddings) -> Any:
    untyped: Any = model
    return untyped.get_output_embeddings() if kind == "output" else untyped.get_input_embeddings()


def _names(
    settings: PretrainedConfig, kind: Embeddings, source: str
) -> tuple[list[str], tuple[int, int]]:
    """What the tensor may be called, the likeliest first, and its shape; no weights are made."""
    with explained(source, "model", local_files_only=True), quiet_transformers():
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(settings, trust_remote_code=False)
    kinds: list[Embeddings] = [kind]
    tied = bool(getattr(settings.get_text_config(), "tie_word_embeddings", False))
    if tied and kind == "output":
        kinds = ["input", "output"]
    names: list[str] = []
    shape: tuple[int, int] | None = None
    for one in kinds:
        module = _module(model, one)
        path = next((path for path, part in model.named_modules() if part is module), None)
        if module is None or path is None or not hasattr(module, "weight"):
            continue
        prefix = f"{model.base_model_prefix}."
        names += [f"{path}.weight", f"{path.removeprefix(prefix)}.weight", f"{prefix}{path}.weight"]
        rows, width = module.weight.shape
        shape = shape or (rows, width)
    if shape is None:
        raise AlignmentError(
            f"{source}: a model of type {settings.model_type!r} names no {kind} embeddings, so "
            "nothing can be aligned with them"
        )
    for one in kinds:
        names += _ELSEWHERE[one]
    return list(dict.fromkeys(names)), shape
