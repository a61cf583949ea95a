"""``fusion-detox explain``: what fusion did to each token, in the terminal or as a page."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_detox.cli.console import note, quiet_libraries, results
from fusion_detox.cli.options import with_options
from fusion_detox.cli.shared_options import (
    SAMPLING,
    CalibratorName,
    Device,
    Dtype,
    Greedy,
    Offline,
    Revision,
    SavedAlignment,
    System,
    Target,
    Temperature,
    TopK,
    TopP,
)
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from fusion_detox.generation.explanation import Explanation

_FUSION = "Fusion (defaults: what the calibrator recommends)"
_SHOWN_ALTERNATIVES = 2


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    fusion = with_options(FusionConfig, "fusion", panel=_FUSION, show_defaults=False)
    app.command("explain")(fusion(explain))


def explain(
    model: Target,
    prompt: Annotated[
        str,
        typer.Argument(
            help="The text to complete, or the request. With --text, it may be left out."
        ),
    ] = "",
    text: Annotated[
        str | None,
        typer.Option(help="Explain this continuation of the prompt (default: generate one)."),
    ] = None,
    base: Annotated[
        bool,
        typer.Option(
            "--base", help="Generate without fusion, and show what fusion would have held back."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write an HTML page, and the numbers as JSON beside it (default: show a table in "
            "the terminal).",
            metavar="FILE.html",
        ),
    ] = None,
    calibrator: CalibratorName = "english-16k",
    alignment: SavedAlignment = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt to the model as a request, in its chat template (default: if it "
            "has one and its name says instruct, chat or -it).",
            show_default=False,
        ),
    ] = None,
    system: System = None,
    top: Annotated[int, typer.Option(help="Alternatives per step on the page.")] = 5,
    mask: Annotated[
        bool,
        typer.Option(
            "--mask/--no-mask", help="In the terminal, replace the vowels of toxic words with *."
        ),
    ] = True,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum tokens to generate.", rich_help_panel=SAMPLING)
    ] = 40,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    greedy: Greedy = False,
    seed: Annotated[int, typer.Option(help="Sampling seed.", rich_help_panel=SAMPLING)] = 0,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    fusion: dict[str, Any] = {},  # noqa: B006 - replaced by one option per setting
) -> None:
    """Show what fusion does to each token of a text: one it generates, or one you give."""
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"--output is {output}, but it is an HTML page with a .json file beside it: give a "
            "name that ends in .html"
        )
    if text is None and not prompt.strip():
        raise ConfigError("there is no prompt: give one, or give a text to explain with --text")
    if text is not None and base:
        raise ConfigError("--base generates a text, but --text gives one: drop one of them")

    from fusion_detox.generation.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        greedy=greedy,
        seed=seed,
    )

    from fusion_detox.cli.loading import check_fused
    from fusion_detox.evaluation.report import write_explanation
    from fusion_detox.generation.explanation import explain_text
    from fusion_detox.scoring.lexical import LexicalScorer
    from fusion_detox.scoring.offensive import mask_words

    with quiet_libraries():
        checked = check_fused(
            model,
            calibrator,
            fusion,
            alignment=alignment,
            chat=chat,
            system=system,
            revision=revision,
            offline=offline,
        )
        loaded = checked.load(device, dtype)
        # With --text alone, there is no request to put to a chat model.
        as_chat = checked.chat and (bool(prompt.strip()) or bool(chat))
        found = explain_text(
            loaded.model,
            loaded.tokenizer,
            loaded.processor,
            prompt,
            text,
            chat=as_chat,
            system=system,
            sampling=sampling,
            fused=not base,
            top=top,
            name=model,
        )
        score = LexicalScorer.load().score
        if output is not None:
            written = write_explanation(found, output, score=score)
            note(f"Wrote {written} and {written.with_suffix('.json')}.")
        else:
            _show(found, (lambda text: mask_words(text, score)) if mask else str, mask)


def _show(found: Explanation, hide: Callable[[str], str], masked: bool) -> None:
    from rich.text import Text

    from fusion_detox.scoring.offensive import masked_pieces

    console = results()
    colour = console.is_terminal and not console.no_color
    texts = masked_pieces([found.prompt, *(token.text for token in found.tokens)], hide)
    console.print(
        *(
            ["Vowels of toxic words are masked (--no-mask shows them)."]
            if masked and "".join(texts) != found.prompt + found.text
            else []
        ),
        {
            "fused": "Written with fusion.",
            "base": "Written without fusion; marks show what fusion would have done.",
            "given": "A given text.",
        }[found.source],
        "",
        _text(found, texts, colour),
        "",
        sep="\n",
    )
    console.print(_table(found, texts, hide, colour))
    console.print(
        Text(
            ("Red, underlined" if colour else "[In brackets]")
            + ": held back, that is, made at least e = 2.7 times less likely. "
            f"{found.held_back} of {len(found.tokens)} tokens are. KL(fused ‖ target): "
            f"{found.mean_kl:.4f} nats per token. Target: {found.model}. Calibrator: "
            f"{found.calibrator}, rule {found.config['rule']}, strength "
            f"{found.config['strength']:g}. For all alternatives, write a page: --output FILE.html"
        )
    )


def _text(found: Explanation, texts: list[str], colour: bool) -> Text:
    from rich.text import Text

    shown = Text(texts[0] + ("\n" if found.chat else ""), style="dim")
    for text, token in zip(texts[1:], found.tokens, strict=True):
        change, word = token.step.written.change, text.lstrip()
        shown.append(text[: len(text) - len(word)])
        if token.held_back:
            shown.append(word if colour else f"[{word}]", "not dim underline bold red")
        else:
            moved = "red" if change <= -0.1 else "green" if change >= 0.1 else "default"
            shown.append(word, f"not dim {moved}")
    return shown


def _table(found: Explanation, texts: list[str], hide: Callable[[str], str], colour: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    from fusion_detox.evaluation.report.explanation import in_words

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("token", overflow="fold")
    table.add_column("likelihood", no_wrap=True)
    for title in ("before", "after", "strength", "KL", "diverg."):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("most probable after", overflow="fold")
    for text, token in zip(texts[1:], found.tokens, strict=True):
        step = token.step
        style = "bold red" if token.held_back and colour else ""
        instead = [
            f"{_chip(hide(one.text))} {_share(one.change.fused_log_prob)}"
            for one in token.after[:_SHOWN_ALTERNATIVES]
        ]
        table.add_row(
            Text(_chip(text), style),
            Text(in_words(step.written).replace(" times ", "× ").removesuffix(" likely"), style),
            _share(step.written.target_log_prob),
            _share(step.written.fused_log_prob),
            f"{token.strength:.2f}",
            f"{step.kl:.3f}",
            "–" if token.divergence is None else f"{token.divergence:.3f}",
            ", ".join(instead),
        )
    return table


def _chip(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "…"


def _share(log_prob: float) -> str:
    share = 100 * math.exp(log_prob)
    return f"{share:.{0 if share >= 9.95 else 1 if share >= 0.95 else 2}f}%"
