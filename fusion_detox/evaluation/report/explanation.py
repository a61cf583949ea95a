"""The page of one explained text: its tokens, coloured by how far fusion moved them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fusion_detox.errors import ConfigError
from fusion_detox.evaluation.report.numbers import NARROW, digits
from fusion_detox.evaluation.report.pages import assets, render, write
from fusion_detox.evaluation.report.reading import jsonable
from fusion_detox.scoring.offensive import (
    Score,
    offensive_after,
    offensive_pieces,
    offensive_spans,
)

if TYPE_CHECKING:
    from fusion_detox.generation.explain import TokenChange
    from fusion_detox.generation.explanation import Candidate, ExplainedToken, Explanation

_SHADES = (0.1, 0.4, 1.0, 2.0)
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
# Size of a plot, in the units of its viewBox.
_WIDTH, _HEIGHT = 640.0, 84.0


class Piece(NamedTuple):
    """A piece of text: as it is, with visible white space, and whether it is hidden at first."""

    text: str
    visible: str
    veiled: bool


class Option(NamedTuple):
    """An alternative at a step, with its probabilities before and after fusion."""

    piece: Piece
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class StepView:
    """One step as the page shows it.

    Attributes:
        number: From 1 on.
        piece: The token.
        shade: Its colour's name, such as ``lower-2``; empty if fusion hardly moved it.
        change: What fusion did to it, in words.
        token: The numbers.
        chances: Its probabilities before and after fusion.
        before: The strongest alternatives before fusion.
        after: The strongest alternatives after fusion.
        open_word: The word that the calibrator's next token could still extend.
        healed: The calibrator's tokens that were cut anew, before and after, if any.
    """

    number: int
    piece: Piece
    shade: str
    change: str
    token: ExplainedToken
    chances: tuple[str, str]
    before: list[Option]
    after: list[Option]
    open_word: Piece
    healed: tuple[list[Piece], list[Piece]] | None


class Bar(NamedTuple):
    """A bar of a plot, in the units of its viewBox."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Plot:
    """Bars, one per step.

    Attributes:
        title: What is drawn.
        description: Its values in words, for readers who cannot see them.
        low: The number at the lower end of the axis.
        high: The number at the upper end.
        zero: The height of zero, in the units of the viewBox.
        bars: The bars.
        width: Width of the viewBox.
        height: Height of the viewBox.
    """

    title: str
    description: str
    low: str
    high: str
    zero: float
    bars: list[Bar]
    width: float = _WIDTH
    height: float = _HEIGHT


def write_explanation(
    explanation: Explanation, path: Path | str, *, score: Score | None = None
) -> Path:
    """Write an explanation as one HTML page that loads nothing else, and as JSON beside it.

    Offensive words are blurred until the reader clicks them; the JSON holds them as they are.

    Args:
        explanation: What ``explain_text`` returned.
        path: The HTML file. The JSON has the same name with the suffix ``.json``.
        score: Decides which single words are offensive; by default the lexical scorer.

    Returns:
        ``path``.

    Raises:
        ConfigError: The file's name does not end in ``.html``.
        DataFileError: A file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"The explanation cannot be written to {str(path)!r}: it is an HTML page with a .json "
            "file beside it; give a name that ends in .html."
        )
    if score is None:
        from fusion_detox.scoring.lexical import LexicalScorer

        score = LexicalScorer.load().score
    steps = step_views(explanation, score)
    page = render(
        "explanation.html",
        explanation=explanation,
        steps=steps,
        prompt=pieces([explanation.prompt], score, words=True),
        target_tokens=_cut(explanation, score),
        calibrator_tokens=pieces(explanation.calibrator_tokens, score),
        plots=plots(explanation),
        decimals=digits,
        **assets("explanation.js", "explanation.css"),
    )
    document = json.dumps(
        jsonable(explanation.to_dict()), indent=2, ensure_ascii=False, allow_nan=False
    )
    write(path.with_suffix(".json"), f"{document}\n".encode("utf-8", "replace"))
    return write(path, page)


def step_views(explanation: Explanation, score: Score) -> list[StepView]:
    """The steps as the page shows them."""
    texts = [explanation.prompt, *(token.text for token in explanation.tokens)]
    veiled = offensive_pieces(texts, score)[1:]
    found, so_far = [], explanation.prompt
    for number, (token, hidden) in enumerate(zip(explanation.tokens, veiled, strict=True), 1):
        written = token.step.written
        found.append(
            StepView(
                number,
                _piece(token.text, hidden),
                _shade(written.change),
                in_words(written),
                token,
                (_percent(written.target_log_prob), _percent(written.fused_log_prob)),
                _options(so_far, token.before, score),
                _options(so_far, token.after, score),
                pieces([token.open_word], score)[0],
                token.healed and (pieces(token.healed[0], score), pieces(token.healed[1], score)),
            )
        )
        so_far = (so_far + token.text)[-64:]
    return found


def in_words(change: TokenChange) -> str:
    """How many times more or less likely fusion made a token."""
    if change.fused_log_prob == -math.inf:
        return "unchanged" if change.target_log_prob == -math.inf else "made impossible"
    factor = math.exp(min(abs(change.change), 50.0))
    if factor < 1.005:
        return "unchanged"
    shown = digits(factor, 2 if factor < 9.95 else 0)
    return f"{shown} times {'less' if change.change < 0 else 'more'} likely"


def pieces(texts: Sequence[str], score: Score, *, words: bool = False) -> list[Piece]:
    """Pieces of one text, those in offensive words veiled; ``words`` also splits at those words."""
    if words:
        (text,) = texts
        cuts = sorted({0, len(text), *(at for span in offensive_spans(text, score) for at in span)})
        texts = [text[a:b] for a, b in pairwise(cuts)]
    return [
        _piece(text, veiled)
        for text, veiled in zip(texts, offensive_pieces(texts, score), strict=True)
    ]


def plots(explanation: Explanation) -> list[Plot]:
    """The plots: the change of each token, strength, KL, and divergence if it is known."""
    tokens = explanation.tokens
    drawn = [
        _plot(
            "Change of the token, in nats (below the line: less likely)",
            # A token made impossible changes by more than any scale.
            [max(-9.0, min(9.0, token.step.written.change)) for token in tokens],
            2,
        ),
        _plot("Strength", [token.strength for token in tokens], 2),
        _plot("KL(fused ‖ target), in nats", [token.step.kl for token in tokens], 3),
    ]
    nats = [token.divergence for token in tokens if token.divergence is not None]
    if nats:
        drawn.append(_plot("Divergence of the calibrator's two models, in nats", nats, 3))
    return drawn


def _plot(title: str, values: Sequence[float], decimals: int) -> Plot:
    high, low = max(0.0, *values), min(0.0, *values)
    scale = _HEIGHT / ((high - low) or 1.0)
    zero = _HEIGHT - (0.0 - low) * scale
    step = _WIDTH / len(values)
    bars = [
        Bar(
            round(n * step + step * 0.1, 2),
            round(zero - max(value, 0.0) * scale, 2),
            round(step * 0.8, 2),
            round(abs(value) * scale, 2),
            f"Step {n + 1}: {digits(value, decimals)}",
        )
        for n, value in enumerate(values)
    ]
    listed = ", ".join(digits(value, decimals) for value in values)
    return Plot(
        title,
        f"{title}. Values by step: {listed}.",
        digits(low, decimals),
        digits(high, decimals),
        round(zero, 2),
        bars,
    )


def _cut(explanation: Explanation, score: Score) -> list[Piece]:
    return pieces(
        [*explanation.prompt_tokens, *(token.text for token in explanation.tokens)], score
    )


def _options(so_far: str, found: Sequence[Candidate], score: Score) -> list[Option]:
    veiled = offensive_after(so_far, [one.text for one in found], score)
    return [
        Option(
            _piece(one.text, hidden),
            _percent(one.change.target_log_prob),
            _percent(one.change.fused_log_prob),
            in_words(one.change),
        )
        for one, hidden in zip(found, veiled, strict=True)
    ]


def _piece(text: str, veiled: bool) -> Piece:
    return Piece(text.replace("\n", "⏎\n"), text.translate(_VISIBLE) or "…", veiled)


def _shade(change: float) -> str:
    level = sum(abs(change) >= least for least in _SHADES)
    return f"{'lower' if change < 0 else 'higher'}-{level}" if level else ""


def _percent(log_prob: float) -> str:
    share = 100 * math.exp(log_prob)
    if 0 < share < 0.01:
        return f"<{NARROW}0.01{NARROW}%"
    return f"{digits(share, 0 if share >= 9.95 else 1 if share >= 0.995 else 2)}{NARROW}%"
