"""What the contrastive objectives are told, with ranges."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from fusion_detox.config import check_settings, setting
from fusion_detox.errors import ConfigError

ContrastiveObjective = Literal["contrastive-perplexity", "signed-margin", "likelihood-ratio"]
Perplexity = Literal["exp", "log"]
Centroid = Literal["moving", "fixed"]
TemperatureIn = Literal["scale", "exponent"]
MarginKind = Literal["hinge", "softplus"]

_GROUP = "Contrastive objective"
_WEIGHTS: dict[ContrastiveObjective, tuple[float, float]] = {
    "contrastive-perplexity": (0.0, 0.0),
    "signed-margin": (0.5, 1.0),
    "likelihood-ratio": (0.0, 40.0),
}
"""Of language modelling on the positives, and of KL on general text."""


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Settings of the contrastive objectives; each field's help is the command line's help.

    The defaults of the first six are those of arXiv 2401.08491. ``None`` for a weight means 0 with
    ``contrastive-perplexity``, which the paper trains alone, and the value in the help with the
    other two.
    """

    positives: int = setting(5, _GROUP, "positives drawn per anchor and step, |P|", 1)
    negatives: int = setting(5, _GROUP, "negatives drawn per anchor and step, |N|", 0)
    temperature: float = setting(
        0.1, _GROUP, "tau; it cancels unless --temperature-in is exponent", 1e-4
    )
    negative_weight: float = setting(1.0, _GROUP, "alpha, weight of each negative", 0.0)
    perplexity: Perplexity = setting(  # noqa: RUF009 - it returns a field
        "exp", _GROUP, "distance between perplexities (exp) or their logarithms (log)"
    )
    centroid: Centroid = setting(  # noqa: RUF009 - it returns a field
        "moving", _GROUP, "whether the gradient flows through the prototype: moving, or fixed"
    )
    temperature_in: TemperatureIn = setting(  # noqa: RUF009 - it returns a field
        "scale", _GROUP, "scale: exp(-d)/tau, as notes on the paper have it; exponent: exp(-d/tau)"
    )
    margin: float = setting(
        1.0, _GROUP, "signed-margin: nats a token that a negative must lie above the prototype", 0.0
    )
    margin_kind: MarginKind = setting(  # noqa: RUF009 - it returns a field
        "hinge", _GROUP, "signed-margin: hinge, or softplus, which never quite rests"
    )
    tilt: float = setting(
        10.0,
        _GROUP,
        "likelihood-ratio: nats by which a wholly toxic wording is to lose against a harmless one",
        0.0,
    )
    lm_weight: float | None = setting(
        None, _GROUP, "weight of language modelling on the positives (signed-margin: 0.5)", 0.0
    )
    kl_weight: float | None = setting(
        None,
        _GROUP,
        "weight of the KL divergence from the base model on general text, where such text is "
        "given (signed-margin: 1, likelihood-ratio: 40)",
        0.0,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def anchor_weights(self, objective: ContrastiveObjective) -> tuple[float, float]:
        """The weights of language modelling and of KL, with the defaults of an objective."""
        lm, kl = _WEIGHTS[objective]
        return (
            lm if self.lm_weight is None else self.lm_weight,
            kl if self.kl_weight is None else self.kl_weight,
        )

    def check_teaches(self, objective: ContrastiveObjective) -> None:
        """Refuses settings under which an objective has no gradient.

        Raises:
            ConfigError: There are no negatives, or they weigh nothing, and nothing else is learned.
        """
        silent = not self.negatives or (
            objective == "contrastive-perplexity" and not self.negative_weight
        )
        if silent and not self.anchor_weights(objective)[0]:
            raise ConfigError(
                "without negatives the contrast is always 0 and nothing is learned: draw some "
                "with --negatives, or learn from the positives with --lm-weight"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return dataclasses.asdict(self)
