"""Whether fusion harms harmless text about or by some groups more than other text.

Xu et al. 2021 (arXiv 2104.06390) found this side effect of detoxification: perplexity rises more on
text in African American English and on text that mentions minorities than on other text. A group's
perplexity ratio, fused over base, is therefore divided by that of a control group, pair by pair if
the suite has pairs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from fusion_detox.errors import DataError
from fusion_detox.evaluation.metrics.harmless import TextChange, impossible
from fusion_detox.evaluation.metrics.statistics import (
    Floats,
    Interval,
    Resamples,
    finite,
    interval,
    percentiles,
)


def groups(
    suite: str,
    changes: Sequence[TextChange],
    names: Sequence[str],
    seed: int,
    *,
    control: str | None = None,
    pairs: Sequence[Hashable] | None = None,
    count: int = 2000,
) -> list[dict[str, Any]]:
    """The effect of fusion on the texts of each group of a suite, as in ``results.json``.

    Args:
        suite: Name of the suite.
        changes: The change of each text.
        names: The group of each text.
        seed: Seed of the resamples of texts.
        control: The group to compare with; without it, there are no ratios.
        pairs: Texts with equal values form a pair; ``None`` means unpaired. If a group shares pairs
            with the control, only the paired texts enter its ratio, and pairs are resampled.
            Otherwise, the texts of both groups are resampled independently.
        count: Number of resamples.

    Returns:
        For each group, in order of appearance, ``suite``, ``group``, ``texts``, ``tokens``,
        ``loss_base`` and ``loss_fused`` (nats per token), ``change`` (fused minus base, with
        interval), ``ratio`` and ``impossible`` (see :func:`harmless`). ``ratio`` is ``exp`` of the
        group's change minus the control's: 1.1 means that fusion raises the perplexity of the
        group's text 10 % more than that of the control text. It is ``[1.0, null, null]`` for the
        control itself.

    Raises:
        DataError: Lengths differ, or no text belongs to the control.
    """
    if len(names) != len(changes) or (pairs is not None and len(pairs) != len(changes)):
        raise DataError(
            f"{len(changes)} texts with {len(names)} group names and "
            f"{'no' if pairs is None else len(pairs)} pairs do not match; give one per text"
        )
    if control is not None and control not in names:
        raise DataError(
            f"suite {suite!r} has no text of the control group {control!r}; its groups are "
            f"{', '.join(sorted(set(names)))}"
        )
    sums = _sums(changes)
    members: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    result = []
    for name, rows in members.items():
        fused, base, tokens = sums[rows].sum(0)
        ratio: Interval | None = None
        if control == name:
            ratio = [1.0, None, None]
        elif control is not None:
            ratio = _against(sums, rows, members[control], pairs, seed, count)
        result.append(
            {
                "suite": suite,
                "group": name,
                "texts": int((sums[rows, 2] > 0).sum()),
                "tokens": int(tokens),
                "loss_base": finite(base / tokens) if tokens else None,
                "loss_fused": finite(fused / tokens) if tokens else None,
                "change": interval(sums[rows], _change, Resamples(len(rows), seed, count)),
                "ratio": ratio,
                "impossible": impossible([changes[k] for k in rows]),
            }
        )
    return result


def _sums(changes: Sequence[TextChange]) -> Floats:
    """Fused loss, base loss and tokens of each text, ``(texts, 3)``."""
    rows = [(float(c.loss_fused.sum()), float(c.loss_base.sum()), c.tokens) for c in changes]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _change(sums: Floats) -> Floats:
    change: Floats = (sums[..., 0] - sums[..., 1]) / sums[..., 2]
    return change


def _against(
    sums: Floats,
    group: Sequence[int],
    control: Sequence[int],
    pairs: Sequence[Hashable] | None,
    seed: int,
    count: int,
) -> Interval:
    if pairs is not None:
        tables = []
        for rows in (group, control):
            table: dict[Hashable, Floats] = {}
            for row in rows:
                if pairs[row] is not None:
                    table[pairs[row]] = table.get(pairs[row], np.zeros(3)) + sums[row]
            tables.append(table)
        shared = [key for key in tables[0] if key in tables[1]]
        if shared:
            both = np.array([[*tables[0][key], *tables[1][key]] for key in shared])
            return interval(both, _double_ratio, Resamples(len(shared), seed, count))
    parts = sums[list(group)], sums[list(control)]
    with np.errstate(all="ignore"):
        value = float(_double_ratio(np.concatenate([part.sum(0) for part in parts])))
        if not math.isfinite(value) or min(map(len, parts)) < 2:
            return [finite(value), None, None]
        # Two seeds, so that groups of equal size are not resampled as pairs.
        drawn = [Resamples(len(part), seed + k, count).sums(part) for k, part in enumerate(parts)]
        return percentiles(value, _double_ratio(np.concatenate(drawn, axis=-1)))


def _double_ratio(sums: Floats) -> Floats:
    return np.exp(_change(sums[..., :3]) - _change(sums[..., 3:]))
