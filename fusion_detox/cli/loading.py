"""Loads what a command runs: a target, its tokenizer, and the fusion of a calibrator into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.processor import FusionLogitsProcessor


class Loaded(NamedTuple):
    """A target and its fusion; ``chat`` is whether its prompts are requests."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: FusionLogitsProcessor
    chat: bool


def load_fused(
    model: str,
    calibrator: str,
    fusion: dict[str, Any],
    *,
    alignment: Path | None = None,
    chat: bool | None = None,
    system: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Loaded:
    """Loads a target and a calibrator. Wrong settings are found before the target is loaded.

    Args:
        model: A folder, a hub id, or ``packaged:NAME``.
        calibrator: A shipped name, a folder, or a hub id.
        fusion: Fusion settings that replace those that the calibrator recommends.
        alignment: Folder that ``align --out`` wrote.
        chat: Whether prompts are requests; by default, if the target is a chat model.
        system: The system prompt of the chat.
        device: Where to run; by default ``cuda`` if available.
        dtype: Of the target; by default that of its files.
        revision: Branch, tag or commit of a hub model.
        offline: Whether to use only files already downloaded.

    Raises:
        FusionDetoxError: A setting is wrong, or a part cannot be loaded.
    """
    import torch

    from fusion_detox.alignment.store import load_alignment
    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.files.adapters import find_adapter
    from fusion_detox.files.models import load_target, load_tokenizer
    from fusion_detox.generation.chat import choose_chat
    from fusion_detox.generation.sampling import pad_token_id
    from fusion_detox.processor import FusionLogitsProcessor

    loaded = Calibrator.from_pretrained(calibrator, local_files_only=offline)
    config = loaded.config.replace(**fusion)
    if alignment is not None and not config.aligned:
        raise ConfigError(
            f"--alignment is for the aligned rules, but the rule is {config.rule!r}: add "
            "--rule aligned or --rule aligned_contrast, or drop --alignment"
        )
    projection = None if alignment is None else load_alignment(alignment)
    named = load_tokenizer(model, local_files_only=offline, revision=revision)
    adapter = find_adapter(model)
    chat = choose_chat(chat, system, adapter.base if adapter else model, named)
    target, tokenizer = load_target(
        model,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=dtype,
        local_files_only=offline,
        revision=revision,
    )
    processor = FusionLogitsProcessor(
        loaded,
        tokenizer,
        config,
        pad_token_id=pad_token_id(target, tokenizer),
        target=target,
        alignment=projection,
    )
    return Loaded(target, tokenizer, processor, chat)
