"""Any transformers text classifier as a toxicity scorer."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fusion_detox.config import check_number
from fusion_detox.errors import ModelError, VocabularyError
from fusion_detox.files.hub import stay_local
from fusion_detox.files.loading_errors import describe, explained
from fusion_detox.files.models import check_device, load_tokenizer, locate, quiet_transformers
from fusion_detox.scoring.base import TOXICITY, Scorer, file_safe, score_batches
from fusion_detox.scoring.labels import find_toxic, is_harmless, is_multi_label, type_name
from fusion_detox.scoring.sources import identity

_USUAL_LENGTH = 512


class ClassifierScorer(Scorer):
    """A text classifier whose labels become types of toxicity.

    The main score is the total probability of the toxic labels if labels are exclusive (softmax),
    and that of the toxicity label if they are independent (sigmoid). Each label becomes a type,
    with its name in snake case; if a single label is the main score, its type is ``"toxicity"``.

    Args:
        model: A sequence classifier; it is put into eval mode.
        tokenizer: The model's tokenizer.
        name: The scorer's name, usable as a file name.
        label: The toxic label, or several separated by commas. By default, it is found by name.
        multi_label: Whether labels are independent. By default, the model's config decides.
        batch_size: Texts per batch.
        max_length: Maximum tokens per text; by default, the model's limit. Longer texts are cut.
        only: The types to return besides ``"toxicity"``, by default all.
        about: Facts that identify the model in ``record()``.

    Raises:
        ConfigError: The toxic label is unclear or unknown, or ``max_length`` is below 1.
        ModelError: The model was trained for regression.
        VocabularyError: The tokenizer belongs to another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        label: str | None = None,
        multi_label: bool | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        only: Collection[str] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        config = model.config
        names = {int(index): str(label) for index, label in (config.id2label or {}).items()}
        self.labels = [names[index] for index in sorted(names)]
        if tokenizer.vocab_size > (size := _vocabulary(model)):
            raise VocabularyError(
                f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, but the model only "
                f"{size}. They belong to different models; give a folder with a matching pair."
            )
        if max_length is not None:
            check_number("max_length", max_length, 1, whole=True)
        if multi_label is None:
            multi_label = is_multi_label(self.labels, config.problem_type, name)
        self.multi_label = multi_label
        self.toxic = find_toxic(self.labels, multi_label=multi_label, wanted=label, source=name)
        self.model, self.tokenizer, self.name = model.train(False), tokenizer, name
        # Without a pad token, texts of different lengths cannot share a batch.
        self.batch_size = batch_size if tokenizer.pad_token is not None else 1
        self.max_length = _length(model, tokenizer) if max_length is None else max_length
        self._types = self._name_types(only)
        self._about = dict(about or {"model": name})

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        name: str | None = None,
        device: str | torch.device | None = None,
        label: str | None = None,
        multi_label: bool | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        only: Collection[str] | None = None,
        about: Mapping[str, Any] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> ClassifierScorer:
        """Loads a classifier in float32, from safetensors and without remote code.

        Args:
            name_or_path: A folder or a hub id.
            name: The scorer's name. By default ``classifier-`` and the model's name, followed by
                the weights hash for a folder and by the label if one is given.
            device: Device of the model, the CPU by default.
            label: See the class.
            multi_label: See the class.
            batch_size: See the class.
            max_length: See the class.
            only: See the class.
            about: More facts for ``record()``; they override those read from the files.
            revision: Branch, tag or commit of a hub repository.
            local_files_only: Never contact the hub.

        Raises:
            ModelNotFoundError: The model was not found, or the hub cannot be reached.
            ModelError: The model is damaged, not a classifier, or has no safetensors.
            VocabularyError: The tokenizer belongs to another model.
            ConfigError: See the class; or the device does not exist.
        """
        place, source = check_device(device), locate(name_or_path, "model")
        model = _load_model(source, place, revision, local_files_only)
        tokenizer = load_tokenizer(source, local_files_only=local_files_only, revision=revision)
        known = {**identity(source, revision), **(about or {})}
        if name is None:
            parts = ["classifier", known["model"]]
            # Different folders may have the same name.
            parts += [known["weights"]] if Path(source).is_dir() else []
            name = file_safe("-".join([*parts, *([type_name(label)] if label else [])]))
        return cls(
            model,
            tokenizer,
            name=name,
            label=label,
            multi_label=multi_label,
            batch_size=batch_size,
            max_length=max_length,
            only=only,
            about=known,
        )

    def record(self) -> dict[str, Any]:
        """JSON-ready facts: model, commit, weights hash, licence, labels, formula, truncation."""
        return {
            "name": self.name,
            **self._about,
            "labels": self.labels,
            "probabilities": "sigmoid of each" if self.multi_label else "softmax of all",
            "toxicity": self.toxic.rule,
            "truncation": f"{self.max_length} tokens",
        }

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """Probabilities per type; nan for a text that failed.

        Raises:
            NoTextScoredError: Every text failed.
        """
        harmless = {kind: 1.0 for kind, i in self._types.items() if is_harmless(self.labels[i])}
        return score_batches(
            self._batch,
            texts,
            name=self.name,
            types=[TOXICITY, *self._types],
            batch_size=self.batch_size,
            blank=harmless,
        )

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> dict[str, list[float]]:
        inputs = self.tokenizer(
            texts,
            padding=len(texts) > 1,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.model.device)
        logits: Tensor = self.model(**inputs).logits.float()
        chances = torch.sigmoid(logits) if self.multi_label else torch.softmax(logits, dim=-1)
        read = chances[:, list(self.toxic.indices)]
        main = read.amax(1) if self.multi_label else read.sum(1).clamp(max=1.0)
        found = {TOXICITY: (1.0 - main if self.toxic.inverted else main).tolist()}
        return found | {kind: chances[:, i].tolist() for kind, i in self._types.items()}

    def _name_types(self, only: Collection[str] | None) -> dict[str, int]:
        """The types besides ``"toxicity"``, with the index of each one's label."""
        types: dict[str, int] = {}
        for index, label in enumerate(self.labels):
            if (index,) == self.toxic.indices and not self.toxic.inverted:
                continue
            kind = type_name(label)
            if kind == TOXICITY or kind in types:
                kind = f"{kind}_label_{index}"
            if only is None or kind in only:
                types[kind] = index
        return types


def _load_model(
    source: str, device: torch.device, revision: str | None, local_files_only: bool
) -> PreTrainedModel:
    auto: Any = AutoModelForSequenceClassification  # its types lack output_loading_info
    try:
        with explained(source, "model", local_files_only), quiet_transformers():
            model, info = auto.from_pretrained(
                source,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=stay_local(source, local_files_only),
                revision=revision or "main",
            )
            model.to(device)
    except ModelError as error:
        # The shared advice names the class for target models.
        advice = str(error).replace("AutoModelForCausalLM", auto.__name__)
        raise ModelError(advice) from error
    if info["missing_keys"]:
        raise ModelError(
            f"{source} lacks {describe(info['missing_keys'])}: it is incomplete or not a text "
            "classifier. Give a model that was trained to classify text."
        )
    loaded: PreTrainedModel = model
    return loaded


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The maximum number of tokens that the model reads."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    untyped: Any = model.base_model
    embedded = getattr(getattr(untyped, "embeddings", None), "position_embeddings", None)
    padding = getattr(embedded, "padding_idx", None)
    if positions and padding is not None:
        positions -= padding + 1  # RoBERTa's positions start after the padding index
    limits = [int(limit) for limit in (positions, tokenizer.model_max_length) if limit]
    shortest = min(limits, default=_USUAL_LENGTH)
    # Tokenizers without a known limit report a huge number.
    return shortest if shortest < 1_000_000 else _USUAL_LENGTH
