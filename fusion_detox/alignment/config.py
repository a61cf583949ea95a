"""Settings for ``align``, with their ranges."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from fusion_detox.config import check_choice, check_number, replace_settings
from fusion_detox.errors import ConfigError

Embeddings = Literal["output", "input"]
Start = Literal["procrustes", "random", "identity"]


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """Settings for ``align``. ``AlignmentConfig.paper()`` returns those of the paper.

    The default is a closed form. In our measurements, InfoNCE training made held-out retrieval
    worse and the projected vectors useless as predictions, for every initial matrix
    (docs/aligned.md).

    Attributes:
        embeddings: Which embeddings of the two models to compare: ``"output"``, whose space holds
            the fused vectors, or ``"input"``, as in the paper.
        start: Initial matrix. ``"procrustes"`` is the best orthogonal matrix, times a scale.
            ``"random"`` is Gaussian noise, as in the paper. ``"identity"`` leaves vectors
            unchanged, which is the paper's baseline without alignment; it needs equal widths.
        epochs: Passes of InfoNCE training over the common tokens; 0 keeps the initial matrix.
        batch_size: Common tokens per training step.
        learning_rate: Learning rate of Adam.
        negatives: Random negatives per token, K in the paper.
        held_out: Fraction of the common tokens to hold out for measuring retrieval.
        seed: Seed of the split, the initial matrix, the order of training and the negatives.
    """

    embeddings: Embeddings = "output"
    start: Start = "procrustes"
    epochs: int = 0
    batch_size: int = 512
    learning_rate: float = 1e-3
    negatives: int = 10
    held_out: float = 0.05
    seed: int = 20261120

    def __post_init__(self) -> None:
        check_choice("embeddings", self.embeddings, get_args(Embeddings))
        check_choice("start", self.start, get_args(Start))
        for name, low in (("epochs", 0), ("batch_size", 2), ("negatives", 1), ("seed", 0)):
            check_number(name, getattr(self, name), low, whole=True)
        check_number("learning_rate", self.learning_rate, 0, above=True)
        check_number("held_out", self.held_out, 0, 0.5, above=True)
        if self.start == "random" and not self.epochs:
            raise ConfigError(
                "start is 'random' and epochs is 0, so nothing would be learned: set epochs to at "
                "least 1, or use start='procrustes'"
            )

    @classmethod
    def paper(cls) -> AlignmentConfig:
        """Return the settings of arXiv 2506.01266: InfoNCE on input embeddings, K = 10."""
        return cls(embeddings="input", start="random", epochs=5, batch_size=32)

    def replace(self, **changes: Any) -> AlignmentConfig:
        """Return a copy with some settings changed; their ranges are checked again."""
        return replace_settings(self, changes, "alignment")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return dataclasses.asdict(self)
