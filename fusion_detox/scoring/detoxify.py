"""The Detoxify classifiers (Hanu and Unitary 2020), loaded from safetensors only.

The package ``detoxify`` is not used: it opens its checkpoints with
``torch.load(weights_only=False)``, which runs any code that the file contains. The authors' models
on the hub have safetensors. Judging by its date, ``original`` on the hub is also the package's
model. ``unbiased`` and ``multilingual`` on the hub are the models of 2020, but since 2021 the
package has had newer models with the same names. Their scores differ, so do not compare them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fusion_detox.errors import ConfigError, ModelNotFoundError
from fusion_detox.scoring.base import TOXICITY
from fusion_detox.scoring.classifier import ClassifierScorer

# Commits with safetensors. The first is the authors' own. The other two are the hub's automatic
# conversions of the authors' weights (unmerged pull requests 2 and 1).
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
DEFAULT_VARIANT = "unbiased"
# The models also predict which groups a text mentions, but those are not types of toxicity.
TYPES = (
    TOXICITY,
    "severe_toxicity",
    "obscene",
    "identity_attack",
    "insult",
    "threat",
    "sexual_explicit",
)
NOT_UNPICKLED = (
    "Pickled Detoxify checkpoints are not loaded, because opening one can run code. Use "
    "'detoxify:original', 'detoxify:unbiased' or 'detoxify:multilingual', which load safetensors "
    "from the hub. For another checkpoint, save its model and tokenizer to a folder with "
    "save_pretrained, with the label names in config.json, and use 'detoxify:FOLDER'"
)


def load_detoxify(
    variant: str | os.PathLike[str] = DEFAULT_VARIANT,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 32,
    revision: str | None = None,
    local_files_only: bool = False,
) -> ClassifierScorer:
    """Loads a Detoxify classifier from safetensors.

    Args:
        variant: ``"original"``, ``"unbiased"`` (the default; trained not to treat the mention of a
            group as an attack) or ``"multilingual"``; or a folder or hub id ``org/name`` that holds
            a Detoxify classifier as safetensors.
        device: Device of the model, the CPU by default.
        batch_size: Texts per batch.
        revision: Branch, tag or commit of the hub repository. For the three variants, it replaces
            the commit whose labels were tested.
        local_files_only: Never contact the hub.

    Raises:
        ConfigError: The variant or the device does not exist.
        ModelNotFoundError: The weights are not cached and the hub cannot be reached.
        ModelError: The weights are damaged, or the model has no safetensors.
    """
    place = Path(variant).expanduser()
    if place.is_file():
        raise ConfigError(f"{variant} is a file. {NOT_UNPICKLED}.")
    if variant not in _HUB and not place.is_dir() and "/" not in str(variant):
        raise ConfigError(
            f"there is no Detoxify {str(variant)!r}; choose {', '.join(_HUB)}, or give a folder or "
            "a hub id (org/name) with safetensors"
        )
    if variant not in _HUB:
        return ClassifierScorer.load(
            place if place.is_dir() else variant,
            device=device,
            multi_label=True,
            batch_size=batch_size,
            only=TYPES,
            revision=revision,
            local_files_only=local_files_only,
        )
    repository, commit = _HUB[str(variant)]
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
            f"Detoxify {variant!r} cannot be loaded: {error} Its weights are downloaded once, and "
            "later runs need no network. Without a network, use the scorers 'lexical' or "
            "'contextual', or 'classifier:FOLDER' with a local classifier, or fetch the weights on "
            f"a connected machine with `hf download {repository} --revision {revision or commit}`."
        ) from error
