"""How to fuse: the settings of the processor, with their ranges."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from fusion_detox.errors import ConfigError

Rule = Literal["contrast", "product", "mixture", "aligned", "aligned_contrast"]
Outside = Literal["keep", "remove"]
AlignedNorm = Literal["auto", "layer", "target", "none"]


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Settings of a fusion rule.

    A calibrator's card carries the settings recommended for it; passing none uses those.

    Attributes:
        rule: ``"contrast"`` adds the difference of the calibrator's two distributions to the
            target's log-probs; ``"product"`` and ``"mixture"`` average the target's and the
            clean distribution geometrically or arithmetically. ``"aligned"`` averages the target's
            last hidden states and the clean model's, carried over by a learned matrix (arXiv
            2506.01266); ``"aligned_contrast"`` is the contrast rule with distributions that come
            that way. These two need the target and an alignment.
        strength: How much of it, 0 or more; at most 1 for product, mixture and aligned. 0 returns
            the target's scores untouched.
        plausibility: Tokens less probable than this fraction of the target's most probable token
            are not judged, in 0..1; 0 judges all. (Li et al. 2023, contrastive decoding, eq. 3.)
        outside: What happens to those: ``"keep"`` leaves them as they stand to each other,
            ``"remove"`` gives them no probability.
        clip: Bound of a token's log-ratio, in nats, above 0.
        threshold: Log-ratios smaller than this, in nats, count as no difference, and larger ones
            lose as much (soft threshold), 0 or more. It keeps harmless text as it was.
        floor: Probability added to both distributions before their ratio is taken, so that
            the noise of tokens that both find impossible does not count.
        kl_budget: Per step, the strength is lowered until the fused distribution is at most this
            many nats of KL divergence away from the target's; ``None`` sets no bound.
        context_kl: Adapts the strength to the text so far: it is whole where the calibrator's
            reference and clean model have differed by this many nats, KL(reference ‖ clean)
            averaged over the last 16 tokens, and in proportion less where they agree more. Toxic
            text is then steered hard while harmless text stays nearly as it was. It needs a
            calibrator with a reference, whatever the rule. ``None``: the same strength everywhere.
        aligned_norm: What the aligned rules do to a vector that was carried over: ``"layer"`` is
            layer normalisation without weights, as in the paper, ``"target"`` the same times the
            root mean square of the target's own vectors, ``"none"`` nothing. ``"auto"`` is
            ``"layer"`` for aligned and ``"target"`` for aligned_contrast.
    """

    rule: Rule = "contrast"
    strength: float = 1.0
    plausibility: float = 1e-3
    outside: Outside = "keep"
    clip: float = 3.0
    threshold: float = 0.0
    floor: float = 1e-7
    kl_budget: float | None = None
    context_kl: float | None = None
    aligned_norm: AlignedNorm = "auto"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ConfigError(f"rule must be one of {', '.join(get_args(Rule))}, not {self.rule!r}")
        if self.outside not in get_args(Outside):
            raise ConfigError(f"outside must be 'keep' or 'remove', not {self.outside!r}")
        if self.aligned_norm not in get_args(AlignedNorm):
            raise ConfigError(
                f"aligned_norm must be one of {', '.join(get_args(AlignedNorm))}, "
                f"not {self.aligned_norm!r}"
            )
        largest = math.inf if self.contrasts else 1.0
        self._check("strength", 0.0, largest)
        self._check("plausibility", 0.0, 1.0)
        self._check("clip", 0.0, math.inf, open_below=True, finite=False)
        self._check("threshold", 0.0, math.inf)
        self._check("floor", 0.0, 1e-2)
        for name in ("kl_budget", "context_kl"):
            if getattr(self, name) is not None:
                self._check(name, 0.0, math.inf, open_below=True)

    @property
    def contrasts(self) -> bool:
        """Whether the rule reads the reference model too."""
        return self.rule in ("contrast", "aligned_contrast")

    @property
    def aligned(self) -> bool:
        """Whether the rule works on hidden states, so that it needs the target and an alignment."""
        return self.rule in ("aligned", "aligned_contrast")

    @property
    def norm(self) -> AlignedNorm:
        """``aligned_norm`` with ``"auto"`` resolved."""
        if self.aligned_norm != "auto":
            return self.aligned_norm
        return "layer" if self.rule == "aligned" else "target"

    def _check(
        self, name: str, low: float, high: float, open_below: bool = False, finite: bool = True
    ) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (
            not number
            or math.isnan(value)
            or not low <= value <= high
            or (open_below and value == low)
            or (finite and math.isinf(value))
        ):
            above = f"above {low:g}" if open_below else f"at least {low:g}"
            most = "" if math.isinf(high) else f" and at most {high:g} (rule {self.rule!r})"
            raise ConfigError(f"{name} must be a number {above}{most}, but is {value!r}")

    def replace(self, **changes: Any) -> FusionConfig:
        """A copy with some settings changed; their ranges are checked again."""
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise ConfigError(
                f"unknown fusion settings: {', '.join(unknown)}; known are "
                f"{', '.join(field.name for field in dataclasses.fields(self))}"
            )
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        values = dataclasses.asdict(self)
        if math.isinf(self.clip):
            values["clip"] = None
        if self.aligned_norm == "auto":  # of no interest to the other rules
            del values["aligned_norm"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FusionConfig:
        """Settings from a dictionary such as a calibrator's card holds.

        Raises:
            ConfigError: A name is unknown or a value out of range.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"fusion settings must be an object of names and values: {values!r}")
        if values.get("clip", 0) is None:
            values = {**values, "clip": math.inf}
        return cls().replace(**values)
