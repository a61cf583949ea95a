"""``FusionConfig``, and helpers that declare, check and replace the settings of any dataclass."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fusion_detox.errors import ConfigError

_Settings = TypeVar("_Settings")
# Of float32, and of signed integers of 64 bits.
_LARGEST, _LARGEST_WHOLE = 3e38, (1 << 63) - 1
# For strengths and log-ratios. Half precision ends at 65504.
_LARGEST_NATS = 1e4


def setting(
    default: Any,
    group: str,
    text: str,
    low: float | None = None,
    high: float | None = None,
    *,
    aliases: tuple[str, ...] = (),
) -> Any:
    """A dataclass field whose metadata defines its command-line option.

    Args:
        default: The default value.
        group: Heading of the option in the command's help.
        text: Help text of the option.
        low: Smallest value; without it, no range is checked.
        high: Largest value, if there is one.
        aliases: Additional names of the option, such as ``--old-name``.
    """
    return dataclasses.field(
        default=default,
        metadata={"group": group, "help": text, "low": low, "high": high, "aliases": aliases},
    )


def check_settings(settings: Any) -> None:
    """Check each field of a dataclass against its range and its ``Literal`` type.

    Raises:
        ConfigError: A value is not in its ``Literal``, is not a finite number, or is out of range.
            ``None`` is always in range.
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
    """Check that a setting is one of the given choices.

    Raises:
        ConfigError: It is none of them; the message lists the choices.
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
    largest: float | None = None,
    note: str = "",
) -> None:
    """Check that a setting is a number within its range.

    Args:
        name: Name of the setting, for the message.
        value: Its value; booleans do not count as numbers.
        low: Smallest value.
        high: Largest value, if there is one.
        above: Exclude ``low`` itself.
        whole: Require an integer.
        finite: Refuse infinity.
        largest: Larger finite numbers overflow; by default, those of float32 and 64-bit integers.
        note: Appended to the message.

    Raises:
        ConfigError: It is not a number or is out of range.
    """
    kind = int if whole else (int, float)
    # Python neither prints some whole numbers nor converts them to a float.
    huge = isinstance(value, int) and value.bit_length() > 1000
    shown = "a number of hundreds of digits" if huge else repr(value)
    if (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and (low < value if above else low <= value)
        and (high is None or value <= high)
        and (huge or not finite or math.isfinite(value))
    ):
        largest = largest or (_LARGEST_WHOLE if whole else _LARGEST)
        if value <= largest or value == math.inf:
            return
        raise ConfigError(
            f"{name} is {shown}, but numbers above {largest:g} overflow: use a smaller one{note}"
        )
    bounds = f"above {low:g}" if above else f"of at least {low:g}"
    bounds += "" if high is None else f" and at most {high:g}"
    raise ConfigError(
        f"{name} must be a {'whole ' if whole else ''}number {bounds}, but is {shown}{note}"
    )


def replace_settings(settings: _Settings, changes: dict[str, Any], kind: str) -> _Settings:
    """A copy of a settings dataclass with some fields changed and checked again.

    Raises:
        ConfigError: A name is unknown or a value is out of range.
    """
    known = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ConfigError(
            f"unknown {kind} settings: {', '.join(unknown)}; the known ones are {', '.join(known)}"
        )
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


Rule = Literal["contrast", "product", "mixture", "aligned", "aligned_contrast"]
Outside = Literal["keep", "remove"]
AlignedNorm = Literal["auto", "layer", "target", "none"]


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Settings of a fusion rule.

    Each calibrator recommends its own settings, which the processor uses by default.

    Attributes:
        rule: ``"contrast"`` adds the difference of the calibrator's two distributions to the
            target's log-probs. ``"product"`` and ``"mixture"`` are the geometric and the
            arithmetic average of the target's and the clean distributions. ``"aligned"`` averages
            the target's last hidden states with the clean model's, projected by a learned matrix
            (arXiv 2506.01266). ``"aligned_contrast"`` is the contrast rule with distributions
            computed from projected hidden states. The aligned rules need the target model and an
            alignment.
        strength: Weight of the calibrator, 0 or more; at most 1 for product, mixture and aligned.
            0 returns the target's scores untouched.
        plausibility: The candidates are the tokens at least this fraction as probable as the
            target's most probable token, in 0..1; with 0, all tokens are candidates. (Li et al.
            2023, contrastive decoding, eq. 3.) Unless ``outside`` is ``"remove"``, the limit is
            soft, so that rounding of the scores changes little: half a nat below it, a token moves
            by nothing, at the limit by half of its shift, and half a nat above by all of it.
        max_candidates: Upper bound on the number of candidates, 1 or more: of a flat distribution,
            only the most probable tokens move, and near the last of them by a part of their shift.
            A bound limits the cost of a step. ``None`` sets none.
        outside: How to treat tokens that are not candidates: ``"keep"`` preserves their relative
            probabilities, ``"remove"`` sets them to zero probability.
        clip: Bound on the absolute log-ratio of a token, in nats, above 0.
        threshold: Soft threshold on log-ratios, in nats, 0 or more: smaller ones become 0 and
            larger ones shrink by it. It protects harmless text from small differences.
        floor: Probability added to both distributions before their ratio is taken, so that noise
            in tokens that both consider impossible has no effect.
        kl_budget: Upper bound on KL(fused ‖ target) per step, in nats; the strength is lowered to
            meet it. ``None`` sets no bound.
        context_kl: Adapts the strength to the text so far by the factor ``min(1, d /
            context_kl)``, where ``d`` is KL(reference ‖ clean) in nats, averaged over the last 16
            tokens. Toxic text is then steered strongly while harmless text hardly changes. It
            needs a calibrator with a reference, whatever the rule. ``None`` keeps the strength
            constant.
        context_threshold: The divergence ``d`` up to which the strength is 0; below ``context_kl``,
            and ignored without it. The factor is then ``(d - context_threshold) / (context_kl -
            context_threshold)`` within 0..1, so that harmless text stays as it is.
        context_limit: Words that no harmless text needs are held back in any text: of a log-ratio
            below ``-context_limit`` nats, the part below that counts in full, whatever the factor
            of ``context_kl``. For the contrast rules with ``context_kl``; ``None`` lets the factor
            scale all log-ratios.
        word_weight: Factor of the nats by which the calibrator's listed words are held back in any
            text, 0 or more: a token that completes a listed word has at most minus that log-ratio.
            0 ignores the list. For the contrast rule, and calibrators that list words.
        aligned_norm: How the aligned rules normalise a projected hidden state: ``"layer"`` is
            layer normalisation without weights, as in the paper; ``"target"`` multiplies that by
            the root mean square of the target's own hidden states; ``"none"`` does nothing.
            ``"auto"`` is ``"layer"`` for aligned and ``"target"`` for aligned_contrast.
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
    context_threshold: float = 0.0
    context_limit: float | None = None
    aligned_norm: AlignedNorm = "auto"
    max_candidates: int | None = None
    word_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, get_args(Rule))
        check_choice("outside", self.outside, get_args(Outside))
        check_choice("aligned_norm", self.aligned_norm, get_args(AlignedNorm))
        largest = None if self.contrasts else 1.0
        note = "" if self.contrasts else f" (rule {self.rule!r})"
        check_number("strength", self.strength, 0.0, largest, largest=_LARGEST_NATS, note=note)
        check_number("plausibility", self.plausibility, 0.0, 1.0)
        nats = functools.partial(check_number, low=0.0)
        nats("clip", self.clip, above=True, finite=False, largest=_LARGEST_NATS)
        nats("threshold", self.threshold, largest=_LARGEST_NATS)
        check_number("floor", self.floor, 0.0, 1e-2)
        if self.kl_budget is not None:
            nats("kl_budget", self.kl_budget, above=True)
        if self.context_kl is not None:
            nats("context_kl", self.context_kl, above=True)
        nats("context_threshold", self.context_threshold)
        if self.context_limit is not None:
            nats("context_limit", self.context_limit)
        nats("word_weight", self.word_weight, largest=_LARGEST_NATS)
        if self.max_candidates is not None:
            check_number("max_candidates", self.max_candidates, 1, whole=True)
        if self.context_kl is not None and self.context_threshold >= self.context_kl:
            raise ConfigError(
                f"context_threshold is {self.context_threshold:g}, but must be below context_kl, "
                f"which is {self.context_kl:g}: reduce the one or raise the other"
            )

    @functools.cached_property
    def contrasts(self) -> bool:
        """Whether the rule needs the reference model."""
        return self.rule in ("contrast", "aligned_contrast")

    @functools.cached_property
    def aligned(self) -> bool:
        """Whether the rule uses hidden states, and so needs the target model and an alignment."""
        return self.rule in ("aligned", "aligned_contrast")

    @property
    def norm(self) -> AlignedNorm:
        """``aligned_norm`` with ``"auto"`` resolved."""
        if self.aligned_norm != "auto":
            return self.aligned_norm
        return "layer" if self.rule == "aligned" else "target"

    def replace(self, **changes: Any) -> FusionConfig:
        """A copy with some settings changed and checked again."""
        return replace_settings(self, changes, "fusion")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        values = dataclasses.asdict(self)
        if math.isinf(self.clip):
            values["clip"] = None
        if self.aligned_norm == "auto":  # keeps the files of the other rules short
            del values["aligned_norm"]
        if not self.context_threshold:
            del values["context_threshold"]
        if self.word_weight == 1.0:
            del values["word_weight"]
        for name in ("context_limit", "max_candidates"):
            if values[name] is None:
                del values[name]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FusionConfig:
        """Settings from a dictionary that ``to_dict`` returned.

        Raises:
            ConfigError: A name is unknown or a value is out of range.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"fusion settings must be a JSON object, but are {values!r}")
        if values.get("clip", 0) is None:
            values = {**values, "clip": math.inf}
        return cls().replace(**values)
