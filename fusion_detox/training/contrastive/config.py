"""Settings of the contrastive objectives."""

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
"""Default weights of language modelling on the positives and of KL on general text."""


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Settings of the contrastive objectives; the command line shows each field's help.

    The defaults of the first six fields are those of arXiv 2401.08491. ``None`` for a weight means
    0 with ``contrastive-perplexity``, which the paper trains alone; with the other two objectives
    it means the value given in the help.
    """

    positives: int = setting(5, _GROUP, "positives drawn per anchor and step (|P|)", 1)
    negatives: int = setting(5, _GROUP, "negatives drawn per anchor and step (|N|)", 0)
    temperature: float = setting(
        0.1, _GROUP, "tau; has an effect only with --temperature-in exponent", 1e-4
    )
    negative_weight: float = setting(1.0, _GROUP, "alpha, the weight of each negative", 0.0)
    perplexity: Perplexity = setting(  # noqa: RUF009 - it returns a field
        "exp", _GROUP, "measure distance between perplexities (exp) or their logarithms (log)"
    )
    centroid: Centroid = setting(  # noqa: RUF009 - it returns a field
        "moving", _GROUP, "whether the gradient flows through the prototype (moving) or not (fixed)"
    )
    temperature_in: TemperatureIn = setting(  # noqa: RUF009 - it returns a field
        "scale", _GROUP, "scale: exp(-d)/tau, as in notes on the paper; exponent: exp(-d/tau)"
    )
    margin: float = setting(
        1.0,
        _GROUP,
        "signed-margin: how far a negative must lie above the prototype, in nats per token",
        0.0,
    )
    margin_kind: MarginKind = setting(  # noqa: RUF009 - it returns a field
        "hinge", _GROUP, "signed-margin: hinge, or softplus, whose gradient never vanishes"
    )
    tilt: float = setting(
        10.0,
        _GROUP,
        "likelihood-ratio: nats that a fully toxic wording should lose against a harmless one",
        0.0,
    )
    lm_weight: float | None = setting(
        None, _GROUP, "weight of language modelling on the positives (signed-margin: 0.5)", 0.0
    )
    kl_weight: float | None = setting(
        None,
        _GROUP,
        "weight of the KL divergence from the base model on general text, if any is given "
        "(signed-margin: 1, likelihood-ratio: 40)",
        0.0,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def anchor_weights(self, objective: ContrastiveObjective) -> tuple[float, float]:
        """Weights of language modelling and of KL, with the objective's defaults filled in."""
        lm, kl = _WEIGHTS[objective]
        return (
            lm if self.lm_weight is None else self.lm_weight,
            kl if self.kl_weight is None else self.kl_weight,
        )

    def check_teaches(self, objective: ContrastiveObjective) -> None:
        """Reject settings under which the objective has no gradient.

        Raises:
            ConfigError: There are no negatives, or their weight is 0, and ``lm_weight`` is 0 too.
        """
        silent = not self.negatives or (
            objective == "contrastive-perplexity" and not self.negative_weight
        )
        if silent and not self.anchor_weights(objective)[0]:
            raise ConfigError(
                "without negatives the contrast is always 0 and nothing is learned: use "
                "--negatives to draw some, or --lm-weight to learn from the positives"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return dataclasses.asdict(self)
