"""Makes scorers from the names that the command line accepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fusion_detox.scoring.base import Scorer

SCORERS = {
    "lexical": "words and spelling; included in the package, needs no model",
    "contextual": "meaning, by sentence embeddings; included in the package",
    "detoxify:VARIANT": "Detoxify original, unbiased (the default) or multilingual from the hub, "
    "or a folder or hub id; safetensors only",
    "classifier:PATH_OR_HUB_ID#LABEL": "any text classifier of transformers; #LABEL names the "
    "toxic label and is needed only if the label names do not say so",
}
"""The names that ``make_scorer`` accepts, each with a one-line description."""


def make_scorer(
    spec: str,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 32,
    label: str | None = None,
    local_files_only: bool = False,
) -> Scorer:
    """Makes a scorer by name. Different specs give scorers with different names.

    Args:
        spec: One of ``SCORERS``, with the capitalised words filled in.
        device: Device of the scorer's model, the CPU by default; ``lexical`` has no model.
        batch_size: Texts per batch of the model.
        label: The toxic label for ``classifier:``, instead of ``#LABEL``.
        local_files_only: Never contact the hub.

    Raises:
        ConfigError: The scorer is unknown or was removed, or it takes no label.
        MissingExtraError: A package that the scorer needs is not installed.
        ModelNotFoundError: The model is not cached and cannot be downloaded.
        ModelError: The model is damaged or not a classifier.
    """
    kind, colon, rest = spec.strip().partition(":")
    if kind == "classifier" and label is None:
        rest, _, named = rest.partition("#")
        label = named or None
    if label is not None and kind != "classifier":
        raise ConfigError(
            f"the scorer {spec!r} takes no label ({label!r}); only classifier:PATH_OR_HUB_ID does"
        )
    if kind == "perspective":
        raise ConfigError(
            "the scorer 'perspective' was removed: Google announced in January 2026 that "
            "the Perspective API shuts down after 2026. Use 'contextual', 'lexical', "
            "'detoxify:unbiased' or 'classifier:PATH_OR_HUB_ID' instead"
        )
    if kind == "detoxify-package":
        from fusion_detox.scoring.detoxify import NOT_UNPICKLED

        raise ConfigError(f"the scorer 'detoxify-package' was removed. {NOT_UNPICKLED}")
    if kind in ("lexical", "contextual") and not colon:
        if kind == "lexical":
            from fusion_detox.scoring.lexical import LexicalScorer

            return LexicalScorer.load()
        from fusion_detox.scoring.contextual import ContextualScorer

        return ContextualScorer(device=device, batch_size=batch_size)
    if kind == "detoxify" and bool(colon) == bool(rest):
        from fusion_detox.scoring.detoxify import DEFAULT_VARIANT, load_detoxify

        return load_detoxify(
            rest or DEFAULT_VARIANT,
            device=device,
            batch_size=batch_size,
            local_files_only=local_files_only,
        )
    if kind == "classifier" and rest:
        from fusion_detox.scoring.classifier import ClassifierScorer

        return ClassifierScorer.load(
            rest,
            device=device,
            batch_size=batch_size,
            label=label,
            local_files_only=local_files_only,
        )
    raise ConfigError(f"there is no scorer {spec!r}; choose one of: {', '.join(SCORERS)}")
