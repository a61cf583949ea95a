"""``fusion-detox lm-eval``: runs the lm-evaluation-harness on the fused model."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    passing = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command("lm-eval", context_settings=passing)(lm_eval)


def lm_eval(context: typer.Context) -> None:
    """Run EleutherAI's lm-evaluation-harness on the fused model, with any of its arguments.

    For example: fusion-detox lm-eval run --model fusion-detox --model_args
    pretrained=gpt2,calibrator=english-16k --tasks lambada_openai
    """
    from fusion_detox.integrations.lm_eval import main

    main(context.args)
