"""Settings: how they are declared, checked and replaced, and ``FusionConfig`` itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fusion_detox.errors import ConfigError

_Settings = TypeVar("_Settings")


def setting(
    default: Any,
    group: str,
    text: str,
    low: float | None = None,
    high: float | None = None,
    *,
    aliases: tuple[str, ...] = (),
) -> Any:
    """A dataclass field; the command line's options and help are made from its metadata."""
    return dataclasses.field(
        default=default,
        metadata={"group": group, "help": text, "low": low, "high": high, "aliases": aliases},
    )


def check_settings(settings: Any) -> None:
    """Checks each field of a dataclass against its range and its literal type.

    Raises:
        ConfigError: A value is not one of the words that its type lists, not a finite number, or
            outside its range. ``None`` passes.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if get_origin(hint) is Literal:
            check_choice(field.name, value, get_args(hint))
        low = field.metadata.get("low")
        if value is not None and low is not None:
            check_number(field.name, value, low, field.metadata.get("high"))


def check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    """Checks that a setting is one of some words.

    Raises:
        ConfigError: It is not; the message lists the words.
    """
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")


def check_number(
    name: str,
    value: object,
    low: float,
    high: float | None = None,
    *,
    above: bool = False,
    whole: bool = False,
    finite: bool = True,
    note: str = "",
) -> None:
    """Checks that a setting is a number within its range.

    Args:
        name: The setting, for the message.
        value: What was given; booleans are not numbers.
        low: Smallest value.
        high: Largest value, if there is one.
        above: Exclude ``low`` itself.
        whole: Require an integer.
        finite: Refuse infinity.
        note: Ends the message.

    Raises:
        ConfigError: It is not.
    """
    kind = int if whole else (int, float)
    if (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and (low < value if above else low <= value)
        and (high is None or value <= high)
        and (math.isfinite(value) or not finite)
    ):
        return
    bounds = f"above {low:g}" if above else f"of at least {low:g}"
    bounds += "" if high is None else f" and at most {high:g}"
    raise ConfigError(
        f"{name} must be a {'whole ' if whole else ''}number {bounds}, but is {value!r}{note}"
    )


def replace_settings(settings: _Settings, changes: dict[str, Any], kind: str) -> _Settings:
    """A copy of a dataclass with some fields changed, checked again.

    Raises:
        ConfigError: A name is unknown or a value out of range.
    """
    known = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ConfigError(
            f"unknown {kind} settings: {', '.join(unknown)}; known are {', '.join(known)}"
        )
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


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
        check_choice("rule", self.rule, get_args(Rule))
        check_choice("outside", self.outside, get_args(Outside))
        check_choice("aligned_norm", self.aligned_norm, get_args(AlignedNorm))
        largest = None if self.contrasts else 1.0
        note = "" if self.contrasts else f" (rule {self.rule!r})"
        check_number("strength", self.strength, 0.0, largest, note=note)
        check_number("plausibility", self.plausibility, 0.0, 1.0)
        check_number("clip", self.clip, 0.0, above=True, finite=False)
        check_number("threshold", self.threshold, 0.0)
        check_number("floor", self.floor, 0.0, 1e-2)
        if self.kl_budget is not None:
            check_number("kl_budget", self.kl_budget, 0.0, above=True)
        if self.context_kl is not None:
            check_number("context_kl", self.context_kl, 0.0, above=True)

    @functools.cached_property
    def contrasts(self) -> bool:
        """Whether the rule reads the reference model too."""
        return self.rule in ("contrast", "aligned_contrast")

    @functools.cached_property
    def aligned(self) -> bool:
        """Whether the rule works on hidden states, so that it needs the target and an alignment."""
        return self.rule in ("aligned", "aligned_contrast")

    @property
    def norm(self) -> AlignedNorm:
        """``aligned_norm`` with ``"auto"`` resolved."""
        if self.aligned_norm != "auto":
            return self.aligned_norm
        return "layer" if self.rule == "aligned" else "target"

    def replace(self, **changes: Any) -> FusionConfig:
        """A copy with some settings changed; their ranges are checked again."""
        return replace_settings(self, changes, "fusion")

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
