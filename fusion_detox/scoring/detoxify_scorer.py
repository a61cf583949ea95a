"""The three Detoxify models (Hanu and Unitary 2020), of two origins.

``load_detoxify`` loads what their authors put on the model hub, from safetensors; the package
``detoxify`` is not needed. ``original`` is, by its date, the model that the package loads, too.
``unbiased`` and ``multilingual`` are the authors' models of 2020 there, while the package has had
later ones of the same names since 2021: their scores differ, and figures of one must not be
compared with figures of the other.

``DetoxifyPackageScorer`` uses the package, for figures that are comparable with others' of 2021 and
later. **The package unpickles**: it downloads a checkpoint from its authors' releases and opens it
with ``torch.load(weights_only=False)``, which runs whatever code the file holds. Nothing else in
this library does, which is why this scorer has to be asked for by its own name.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any

import torch

from fusion_detox.errors import ConfigError, MissingExtraError, ModelError, ModelNotFoundError
from fusion_detox.files.loading_errors import first_line
from fusion_detox.files.models import check_device
from fusion_detox.scoring.base import TOXICITY, Scorer, score_batches
from fusion_detox.scoring.classifier import ClassifierScorer
from fusion_detox.scoring.labels import type_name

logger = logging.getLogger(__name__)

# Commits that hold safetensors: the authors' own for the first, for the others the hub's automatic
# conversion of the authors' weights (its pull requests 2 and 1, not merged).
_HUB = {
    "original": ("unitary/toxic-bert", "4d6c22e74ba2fdd26bc4f7238f50766b045a0d94"),
    "unbiased": (
        "unitary/unbiased-toxic-roberta",
        "91650552a4f31b7120c36680cfa47ddd47676b48",
    ),
    "multilingual": (
        "unitary/multilingual-toxic-xlm-roberta",
        "a3d4e66839269e45c5e8491dfa55a53fdaedcdbc",
    ),
}
_OLDER = "the authors' model of 2020; the package detoxify has a later one of this name"
VARIANTS = tuple(_HUB)
DEFAULT_VARIANT = "unbiased"
# The models also guess which group of people a text names, which is no kind of toxicity.
TYPES = (
    TOXICITY,
    "severe_toxicity",
    "obscene",
    "identity_attack",
    "insult",
    "threat",
    "sexual_explicit",
)
_OFFLINE = (
    "Its weights are downloaded once, and later runs need no network. Without one, use the scorers "
    "'lexical' or 'contextual', or 'classifier:FOLDER' with a classifier that is here"
)


def load_detoxify(
    variant: str = DEFAULT_VARIANT,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 32,
    revision: str | None = None,
    local_files_only: bool = False,
) -> ClassifierScorer:
    """A Detoxify model from the hub, by safetensors.

    Args:
        variant: ``"original"``, ``"unbiased"`` (the default, for it was trained not to take the
            naming of a group for an attack) or ``"multilingual"``.
        device: Where to put it; the CPU by default.
        batch_size: Texts a batch.
        revision: Another commit of the hub repository than the one tested with its labels.
        local_files_only: Never contact the hub.

    Raises:
        ConfigError: There is no such variant, or no such device here.
        ModelNotFoundError: The weights are not in the cache and the hub cannot be reached.
        ModelError: The weights are damaged.
    """
    repository, commit = _HUB[_check_variant(variant)]
    try:
        return ClassifierScorer.load(
            repository,
            name=f"detoxify-{variant}",
            device=device,
            multi_label=True,
            batch_size=batch_size,
            only=TYPES,
            about={"licence": "Apache-2.0"} | ({} if variant == "original" else {"note": _OLDER}),
            revision=revision or commit,
            local_files_only=local_files_only,
        )
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"Detoxify {variant!r} cannot be loaded: {error} {_OFFLINE}, or fetch it where there "
            f"is a network with `hf download {repository} --revision {revision or commit}`."
        ) from error


class DetoxifyPackageScorer(Scorer):
    """A Detoxify model by the package ``detoxify``, which unpickles its checkpoint.

    Args:
        variant: ``"original"``, ``"unbiased"`` or ``"multilingual"``.
        device: Where to put it; the CPU by default.
        batch_size: Texts a batch.

    Raises:
        ConfigError: There is no such variant, or no such device here.
        MissingExtraError: ``detoxify`` is not installed.
        ModelNotFoundError: The checkpoint or the tokenizer cannot be downloaded.
        ModelError: The package cannot load them.
    """

    def __init__(
        self,
        variant: str = DEFAULT_VARIANT,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 32,
    ) -> None:
        self.variant, place = _check_variant(variant), check_device(device)
        self.name, self.batch_size = f"detoxify-package-{variant}", batch_size
        try:
            import detoxify
        except ImportError as error:
            raise MissingExtraError("detoxify", "evaluate") from error
        logger.warning(
            "detoxify unpickles its checkpoint, which can run code; 'detoxify:%s' does not", variant
        )
        try:
            self._model: Any = detoxify.Detoxify(variant, device=str(place))
        except OSError as error:
            raise ModelNotFoundError(
                f"The package detoxify cannot fetch {variant!r}: {first_line(error)}. {_OFFLINE}."
            ) from error
        except Exception as error:  # unpickling raises anything
            raise ModelError(
                f"The package detoxify cannot load {variant!r}: {first_line(error)}. Use the "
                f"scorer 'detoxify:{variant}' instead, which needs no package."
            ) from error
        self._kinds = {
            kind: name
            for name in map(str, self._model.class_names)
            if (kind := type_name(name)) in TYPES
        }
        if TOXICITY not in self._kinds:
            raise ModelError(
                f"The package detoxify gives no toxicity but {list(self._model.class_names)}; "
                f"use the scorer 'detoxify:{variant}' instead, which needs no package."
            )

    def record(self) -> dict[str, Any]:
        """JSON-ready: package and version, checkpoint, licence, types, truncation."""
        try:
            version = importlib.metadata.version("detoxify")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown"
        length = getattr(getattr(self._model, "tokenizer", None), "model_max_length", None)
        return {
            "name": self.name,
            "model": f"Detoxify {self.variant}, by the package detoxify",
            "version": version,
            "licence": "Apache-2.0",
            "types": list(self._kinds),
            "truncation": "none known" if length is None else f"{length} tokens",
        }

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """Each type to its probabilities in 0..1; a text that failed is nan.

        Raises:
            NoTextScoredError: Every text failed.
        """
        return score_batches(
            self._batch,
            texts,
            name=self.name,
            types=list(self._kinds),
            batch_size=self.batch_size,
        )

    def _batch(self, texts: list[str]) -> dict[str, list[float]]:
        found = self._model.predict(texts)
        # For a list of one text it gives numbers instead of lists.
        return {
            kind: values if isinstance(values := found[name], list) else [values]
            for kind, name in self._kinds.items()
        }


def _check_variant(variant: str) -> str:
    if variant not in _HUB:
        raise ConfigError(f"there is no Detoxify {variant!r}; choose {', '.join(VARIANTS)}")
    return variant
