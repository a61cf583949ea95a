"""How sure a number is: bootstrap over prompts, and paired tests of two settings.

The unit is the prompt (or, on given text, the text): its samples belong together, so whole prompts
are drawn with replacement (Efron and Tibshirani 1993, percentile method, ch. 13). Two settings
that wrote after the same prompts are compared prompt by prompt, which is far sharper than asking
whether two intervals overlap. A prompt whose value is nan is left out, of both sides of a pair.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusion_detox.errors import ConfigError, DataError

Floats = NDArray[np.float64]
Interval = list[float | None]
"""``[value, low, high]``, JSON-ready: ``None`` for what does not exist or is not finite."""
Statistic = Callable[[Floats], Floats]

# Numbers held at a time, about 16 MB an array.
_BLOCK = 1 << 21


@dataclasses.dataclass(frozen=True)
class Resamples:
    """Draws of prompts with replacement, made anew, block by block, whenever they are needed.

    Attributes:
        prompts: How many there are, and how many each resample draws.
        seed: The same seed draws the same prompts for every setting and every metric.
        count: Number of resamples.
    """

    prompts: int
    seed: int
    count: int = 2000

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise DataError("there are no prompts to draw from; a statistic needs at least one")
        if self.count < 1:
            raise ConfigError(f"count must be at least 1 resample, but is {self.count}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, but is {self.seed}")

    def blocks(self) -> Iterator[NDArray[np.int64]]:
        """``(rows, prompts)`` indices, ``count`` rows in all."""
        generator = np.random.default_rng(self.seed)
        rows = max(1, _BLOCK // self.prompts)
        for start in range(0, self.count, rows):
            shape = (min(rows, self.count - start), self.prompts)
            yield generator.integers(0, self.prompts, shape)

    def sums(self, columns: Floats) -> Floats:
        """Sums of each column over each resample, ``(count, columns)``.

        Args:
            columns: ``(prompts, columns)``, finite.
        """
        found = []
        for drawn in self.blocks():
            rows = len(drawn)
            cells = drawn + np.arange(rows)[:, None] * self.prompts
            times = np.bincount(cells.ravel(), minlength=rows * self.prompts)
            found.append(times.reshape(rows, self.prompts).astype(np.float64) @ columns)
        return np.concatenate(found)


def resamples(prompts: int, seed: int, count: int = 2000) -> Resamples:
    """Draws for the intervals below; see :class:`Resamples`."""
    return Resamples(prompts, seed, count)


def interval(columns: ArrayLike, statistic: Statistic, draws: Resamples) -> Interval:
    """A statistic of the sums of some columns over prompts, with its 95 % interval.

    Args:
        columns: ``(prompts, columns)``. A row with a nan is left out.
        statistic: Maps sums ``(..., columns)`` to values ``(...)``. It must be made of ratios of
            these sums, so that leaving prompts out does not change its meaning.
        draws: Resamples of as many prompts.

    Returns:
        ``low`` and ``high`` are ``None`` for fewer than two prompts, or where so many resamples
        are not finite (a denominator of 0) that there is no bound on that side.

    Raises:
        DataError: The number of rows is not that of ``draws``.
    """
    table = np.array(columns, dtype=np.float64)
    if table.ndim != 2 or len(table) != draws.prompts:
        raise DataError(
            f"values of shape {table.shape} do not fit draws of {draws.prompts} prompts; "
            "give one row a prompt"
        )
    missing = np.isnan(table).any(1)
    table[missing] = 0.0
    with np.errstate(all="ignore"):
        value = float(statistic(table.sum(0)))
        if not math.isfinite(value) or len(table) - int(missing.sum()) < 2:
            return [finite(value), None, None]
        return percentiles(value, statistic(draws.sums(table)))


def percentiles(value: float, samples: Floats) -> Interval:
    """``value`` with the 2.5 and 97.5 percentiles of its bootstrap ``samples``.

    A sample that is nan (0/0) says nothing and is left out; one that is infinite counts as larger
    than all others.
    """
    known = samples[~np.isnan(samples)]
    if not math.isfinite(value) or not known.size:
        return [finite(value), None, None]
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(known, [2.5, 97.5])
    return [value, finite(low), finite(high)]


def finite(value: float) -> float | None:
    """The number, or ``None`` where JSON has none: nan and infinities."""
    return float(value) if math.isfinite(value) else None


def missing(values: ArrayLike) -> int:
    """How many prompts :func:`interval` leaves out: those with a nan."""
    table = np.asarray(values, dtype=np.float64)
    return int(np.isnan(table.reshape(len(table), -1)).any(1).sum())


def mean_interval(values: ArrayLike, draws: Resamples) -> Interval:
    """Mean of ``(prompts,)`` values over prompts."""
    column = np.asarray(values, dtype=np.float64)
    return interval(np.stack([column, np.ones_like(column)], -1), _ratio, draws)


def ratio_interval(above: ArrayLike, below: ArrayLike, draws: Resamples) -> Interval:
    """Sum of ``above`` over prompts divided by the sum of ``below``; ``None`` if that is 0."""
    return interval(np.stack([np.asarray(above), np.asarray(below)], -1), _ratio, draws)


def exp_ratio_interval(above: ArrayLike, below: ArrayLike, draws: Resamples) -> Interval:
    """``exp(sum above / sum below)``: a perplexity, from nats and tokens of each prompt."""
    table = np.stack([np.asarray(above), np.asarray(below)], -1)
    return interval(table, lambda sums: np.exp(_ratio(sums)), draws)


class Paired(NamedTuple):
    """One setting against another on the same prompts.

    Attributes:
        difference: Mean of the setting minus mean of the base, with interval.
        ratio: Mean of the setting over mean of the base; ``None`` if the latter is 0.
        p_value: See :func:`sign_flip_p_value`; ``None`` without prompts.
        prompts: How many counted.
        left_out: How many did not, as one of their two values is nan.
    """

    difference: Interval
    ratio: Interval
    p_value: float | None
    prompts: int
    left_out: int


def compare(
    base: ArrayLike, setting: ArrayLike, draws: Resamples, *, flips: int = 10_000
) -> Paired:
    """Compares ``(prompts,)`` values of a setting with those of the base.

    Raises:
        DataError: The two are not of the shape that ``draws`` has.
    """
    one, other = np.asarray(base, dtype=np.float64), np.asarray(setting, dtype=np.float64)
    if one.shape != other.shape:
        raise DataError(
            f"{other.shape} values cannot be paired with {one.shape} of the base; compare settings "
            "on the same prompts"
        )
    pair = np.stack([other, one, np.ones_like(one)], -1)
    left_out = missing(pair)
    return Paired(
        difference=interval(pair, lambda sums: (sums[..., 0] - sums[..., 1]) / sums[..., 2], draws),
        ratio=interval(pair, _ratio, draws),
        p_value=sign_flip_p_value(other - one, draws.seed, flips),
        prompts=len(one) - left_out,
        left_out=left_out,
    )


def sign_flip_p_value(differences: ArrayLike, seed: int, flips: int = 10_000) -> float | None:
    """Two-sided permutation test that paired differences have no direction.

    If the two settings were alike, each prompt's difference could as well have the other sign. The
    p-value is the share of sign patterns whose sum is at least as far from 0: of all patterns where
    there are at most ``flips`` of them (exact), else ``(1 + hits) / (1 + flips)`` of random ones
    (Phipson and Smyth 2010, which never gives 0).

    Args:
        differences: ``(prompts,)``; nan is left out, and 0 has no sign to flip.
        seed: Of the random patterns.
        flips: How many of them.

    Returns:
        ``None`` if there is no difference that is a number.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    values = values[values != 0]
    total = float(values.sum())
    # Sums that are equal on paper must not differ by rounding.
    bound = abs(total) - 1e-10 * float(np.abs(values).sum())
    exact = values.size < 63 and 2**values.size <= flips
    patterns = 2**values.size if exact else flips
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(values.size, 1))
    hits = 0
    for start in range(0, patterns, rows):
        size = min(rows, patterns - start)
        if exact:
            numbers = np.arange(start, start + size)[:, None]
            flipped = ((numbers >> np.arange(values.size)) & 1).astype(np.float64)
        else:
            # Whole words of 32 bits a row, so that the stream does not depend on the blocks.
            words = generator.bytes(size * 4 * -(-values.size // 32))
            bits = np.frombuffer(words, dtype=np.uint8).reshape(size, -1)
            flipped = np.unpackbits(bits, axis=1)[:, : values.size].astype(np.float64)
        sums = total - 2.0 * (flipped @ values)
        hits += int((np.abs(sums) >= bound).sum())
    return hits / patterns if exact else (1 + hits) / (1 + patterns)


def _ratio(sums: Floats) -> Floats:
    quotient: Floats = sums[..., 0] / sums[..., 1]
    return quotient
