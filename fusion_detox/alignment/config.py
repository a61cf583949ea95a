"""How to align: the settings of ``align``, with their ranges."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from fusion_detox.config import check_choice, check_number, replace_settings
from fusion_detox.errors import ConfigError

Embeddings = Literal["output", "input"]
Start = Literal["logits", "ridge", "procrustes", "random", "identity"]
Negatives = Literal["drawn", "batch"]


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """Settings of ``align``; the paper's own are ``AlignmentConfig.paper()``.

    The default is in closed form. InfoNCE, from any start, made held-out retrieval worse and the
    carried vectors useless as predictions wherever we measured it (docs/aligned.md).

    Attributes:
        embeddings: Which embeddings of both models are compared: ``"output"``, in whose space
            the fused vectors live, or ``"input"``, as in the paper.
        start: What the matrix is before training. ``"logits"`` is the least-squares solution for
            vectors to which both output layers give the same logits, ``"ridge"`` the one that
            maps embeddings to embeddings, ``"procrustes"`` the best orthogonal one, ``"random"``
            noise. ``"identity"`` leaves vectors as they are, where both are as long: the paper's
            comparison without alignment.
        epochs: Passes over the common tokens; 0 leaves the matrix as it starts.
        batch_size: Common tokens a step.
        learning_rate: Of Adam.
        negatives: Random tokens that a token is told apart from, K in the paper; with
            ``negatives_from="batch"`` all others of the batch come on top.
        negatives_from: ``"drawn"`` takes the random ones alone, ``"batch"`` both.
        ridge: Weight of the penalty of the closed forms, relative to the mean square of the
            embeddings.
        held_out: Share of the common tokens on which retrieval is measured, for which the matrix
            is not learned.
        seed: Of the split, the order and the negatives.
    """

    embeddings: Embeddings = "output"
    start: Start = "procrustes"
    epochs: int = 0
    batch_size: int = 512
    learning_rate: float = 1e-3
    negatives: int = 10
    negatives_from: Negatives = "batch"
    ridge: float = 1e-2
    held_out: float = 0.05
    seed: int = 20261120

    def __post_init__(self) -> None:
        check_choice("embeddings", self.embeddings, get_args(Embeddings))
        check_choice("start", self.start, get_args(Start))
        check_choice("negatives_from", self.negatives_from, get_args(Negatives))
        for name, low in (("epochs", 0), ("batch_size", 2), ("negatives", 0), ("seed", 0)):
            check_number(name, getattr(self, name), low, whole=True)
        check_number("learning_rate", self.learning_rate, 0, above=True)
        check_number("ridge", self.ridge, 0, above=True)
        check_number("held_out", self.held_out, 0, 0.5, above=True)
        if self.epochs and not self.negatives and self.negatives_from == "drawn":
            raise ConfigError(
                "negatives is 0 and negatives_from 'drawn', so that there is nothing to tell a "
                "token apart from: give negatives, or negatives_from='batch'"
            )
        if self.start == "random" and not self.epochs:
            raise ConfigError(
                "start is 'random' and epochs 0, so that nothing would be learned: give epochs"
            )

    @classmethod
    def paper(cls) -> AlignmentConfig:
        """The settings of arXiv 2506.01266: InfoNCE on input embeddings, K = 10."""
        return cls(
            embeddings="input",
            start="random",
            epochs=5,
            batch_size=32,
            learning_rate=1e-3,
            negatives=10,
            negatives_from="drawn",
        )

    def replace(self, **changes: Any) -> AlignmentConfig:
        """A copy with some settings changed; their ranges are checked again."""
        return replace_settings(self, changes, "alignment")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return dataclasses.asdict(self)
