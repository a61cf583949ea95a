"""Uncertainty of the numbers: bootstrap over prompts, and paired tests of two settings.

The unit is the prompt or, for given texts, the text. Samples of a prompt belong together, so whole
prompts are drawn with replacement (Efron and Tibshirani 1993, percentile method, ch. 13). Two
settings with the same prompts are compared prompt by prompt, which is far more sensitive than
checking whether their intervals overlap. A prompt whose value is nan is left out, on both sides of
a pair.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusion_detox.config import check_number
from fusion_detox.errors import DataError

Floats = NDArray[np.float64]
Interval = list[float | None]
"""``[value, low, high]``, JSON-ready: ``None`` if missing or not finite."""
Statistic = Callable[[Floats], Floats]

# Numbers in memory at the same time, about 16 MB per array.
_BLOCK = 1 << 21


@dataclasses.dataclass(frozen=True)
class Resamples:
    """Draws of prompts with replacement, recomputed block by block when needed.

    Attributes:
        prompts: Number of prompts, which is also the size of a resample.
        seed: Equal seeds draw the same prompts for every setting and metric.
        count: Number of resamples.

    Raises:
        DataError: There are no prompts.
        ConfigError: ``count`` is below 1, or ``seed`` below 0.
    """

    prompts: int
    seed: int
    count: int = 2000

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise DataError("there are no prompts to draw from; a statistic needs at least one")
        check_number("count", self.count, 1, whole=True)
        check_number("seed", self.seed, 0, whole=True)

    def blocks(self) -> Iterator[NDArray[np.int64]]:
        """Indices ``(rows, prompts)`` in blocks, ``count`` rows in total."""
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


def interval(columns: ArrayLike, statistic: Statistic, draws: Resamples) -> Interval:
    """A statistic of column sums over prompts, with its 95 % interval.

    Args:
        columns: ``(prompts, columns)``. A row with a nan is left out.
        statistic: Maps sums ``(..., columns)`` to values ``(...)``. It must be built from ratios of
            the sums, so that leaving out prompts does not change its meaning.
        draws: Resamples of the same number of prompts.

    Returns:
        The interval. ``low`` and ``high`` are ``None`` for fewer than two prompts; one of them is
        ``None`` if too many resamples are not finite (a denominator of 0) to bound that side.

    Raises:
        DataError: The number of rows differs from that of ``draws``.
    """
    table = np.array(columns, dtype=np.float64)
    if table.ndim != 2 or len(table) != draws.prompts:
        raise DataError(
            f"values of shape {table.shape} do not fit draws of {draws.prompts} prompts; "
            "give one row per prompt"
        )
    missing = np.isnan(table).any(1)
    table[missing] = 0.0
    with np.errstate(all="ignore"):
        value = float(statistic(table.sum(0)))
        if not math.isfinite(value) or len(table) - int(missing.sum()) < 2:
            return [finite(value), None, None]
        return percentiles(value, statistic(draws.sums(table)))


def percentiles(value: float, samples: Floats) -> Interval:
    """``value`` with the 2.5th and 97.5th percentiles of its bootstrap ``samples``.

    A sample of nan (0/0) is left out. An infinite sample counts as larger than all others.
    """
    known = samples[~np.isnan(samples)]
    if not math.isfinite(value) or not known.size:
        return [finite(value), None, None]
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(known, [2.5, 97.5])
    return [value, finite(low), finite(high)]


def finite(value: float) -> float | None:
    """The number, or ``None`` for nan and infinities, which JSON lacks."""
    return float(value) if math.isfinite(value) else None


def missing(values: ArrayLike) -> int:
    """The number of prompts that :func:`interval` leaves out because of a nan."""
    table = np.asarray(values, dtype=np.float64)
    return int(np.isnan(table.reshape(len(table), -1)).any(1).sum())


def mean_interval(values: ArrayLike, draws: Resamples) -> Interval:
    """Mean of ``(prompts,)`` values over prompts."""
    column = np.asarray(values, dtype=np.float64)
    return interval(np.stack([column, np.ones_like(column)], -1), _ratio, draws)


def ratio_interval(above: ArrayLike, below: ArrayLike, draws: Resamples) -> Interval:
    """Sum of ``above`` over prompts divided by that of ``below``; ``None`` if the latter is 0."""
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
        prompts: Number of prompts that counted.
        left_out: Number of prompts left out because one of their two values is nan.
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
        DataError: The shapes differ from each other or from that of ``draws``.
    """
    one, other = np.asarray(base, dtype=np.float64), np.asarray(setting, dtype=np.float64)
    if one.shape != other.shape:
        raise DataError(
            f"values of shape {other.shape} cannot be paired with {one.shape} of the base; compare "
            "settings on the same prompts"
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
    """P-value of a two-sided permutation test for the null hypothesis of no difference.

    Under the null hypothesis, each prompt's difference could equally have the opposite sign. The
    p-value is the share of sign patterns whose sum is at least as far from 0. It is exact over all
    patterns if there are at most ``flips``, and otherwise ``(1 + hits) / (1 + flips)`` over random
    patterns (Phipson and Smyth 2010), which is never 0.

    Args:
        differences: ``(prompts,)``; nan is left out.
        seed: Seed of the random patterns.
        flips: Number of random patterns.

    Returns:
        The p-value, or ``None`` if every difference is nan.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    values = values[values != 0]
    total = float(values.sum())
    # Sums that are equal in exact arithmetic must not differ because of rounding.
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
            # Whole 32-bit words per row, so that the block size does not change the stream.
            words = generator.bytes(size * 4 * -(-values.size // 32))
            bits = np.frombuffer(words, dtype=np.uint8).reshape(size, -1)
            flipped = np.unpackbits(bits, axis=1)[:, : values.size].astype(np.float64)
        sums = total - 2.0 * (flipped @ values)
        hits += int((np.abs(sums) >= bound).sum())
    return hits / patterns if exact else (1 + hits) / (1 + patterns)


def _ratio(sums: Floats) -> Floats:
    quotient: Floats = sums[..., 0] / sums[..., 1]
    return quotient
