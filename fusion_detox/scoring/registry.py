"""Scorers by name, as the command line gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fusion_detox.scoring.base import Scorer

SCORERS = {
    "lexical": "words and spelling; comes with the package, needs no model",
    "contextual": "what a text says, by sentence embeddings; comes with the package",
    "detoxify:VARIANT": "Detoxify original, unbiased (the default) or multilingual, from the hub "
    "by safetensors",
    "detoxify-package:VARIANT": "the same names by the package detoxify, which unpickles its "
    "checkpoints; later models than on the hub",
    "classifier:PATH_OR_HUB_ID#LABEL": "any text classifier of transformers; #LABEL, which means "
    "toxic, only where no label's name says so",
    "perspective": "the Perspective API; needs PERSPECTIVE_API_KEY, sends the texts to Google",
}
"""What ``make_scorer`` makes, each with a line that says what it is."""


def make_scorer(
    spec: str,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 32,
    label: str | None = None,
    local_files_only: bool = False,
) -> Scorer:
    """A scorer by its name; different specs give scorers of different names.

    Args:
        spec: One of ``SCORERS``, with the words in capitals filled in.
        device: Where models compute; the CPU by default. ``lexical`` and ``perspective`` have none.
        batch_size: Texts a batch of a model.
        label: For ``classifier:`` only, another way to give the label.
        local_files_only: Never contact the hub.

    Raises:
        ConfigError: There is no such scorer, or it takes no label; the message lists them.
        MissingExtraError: What the scorer needs is not installed.
        ModelNotFoundError: Its model is not here and cannot be downloaded.
        ModelError: Its model is damaged or no classifier.
    """
    kind, colon, rest = spec.strip().partition(":")
    if kind == "classifier" and label is None:
        rest, _, named = rest.partition("#")
        label = named or None
    if label is not None and kind != "classifier":
        raise ConfigError(
            f"the scorer {spec!r} takes no label ({label!r}); only classifier:PATH_OR_HUB_ID does"
        )
    if bool(colon) == bool(rest):
        if kind == "classifier" and rest:
            from fusion_detox.scoring.classifier import ClassifierScorer

            return ClassifierScorer.load(
                rest,
                device=device,
                batch_size=batch_size,
                label=label,
                local_files_only=local_files_only,
            )
        if kind in ("detoxify", "detoxify-package"):
            from fusion_detox.scoring import detoxify_scorer

            variant = rest or detoxify_scorer.DEFAULT_VARIANT
            if kind == "detoxify":
                return detoxify_scorer.load_detoxify(
                    variant,
                    device=device,
                    batch_size=batch_size,
                    local_files_only=local_files_only,
                )
            return detoxify_scorer.DetoxifyPackageScorer(
                variant, device=device, batch_size=batch_size
            )
        if not rest and (scorer := _plain(kind, device, batch_size)) is not None:
            return scorer
    raise ConfigError(f"there is no scorer {spec!r}; choose one of: {', '.join(SCORERS)}")


def _plain(kind: str, device: str | torch.device | None, batch_size: int) -> Scorer | None:
    if kind == "lexical":
        from fusion_detox.scoring.lexical import LexicalScorer

        return LexicalScorer.load()
    if kind == "contextual":
        from fusion_detox.scoring.contextual import ContextualScorer

        return ContextualScorer(device=device, batch_size=batch_size)
    if kind == "perspective":
        from fusion_detox.scoring.perspective import PerspectiveScorer

        return PerspectiveScorer()
    return None
