"""Loads what a command runs: a target, its tokenizer, and the fusion of a calibrator into it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.alignment.alignment import Alignment
    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.config import FusionConfig
    from fusion_detox.files.adapters import Adapter
    from fusion_detox.processor import FusionLogitsProcessor


class Loaded(NamedTuple):
    """A target and the fusion into it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: FusionLogitsProcessor


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a command runs, checked as far as it can be before the target is loaded.

    Attributes:
        model: A folder, a hub id, or ``packaged:NAME``.
        adapter: The LoRA adapter in that folder, if it is one.
        calibrator: The calibrator.
        config: The fusion settings.
        alignment: What ``align --out`` wrote, if it was given.
        chat: Whether prompts are requests.
        revision: Branch, tag or commit of a hub model.
        offline: Whether to use only files already downloaded.
    """

    model: str
    adapter: Adapter | None
    calibrator: Calibrator
    config: FusionConfig
    alignment: Alignment | None
    chat: bool
    revision: str | None
    offline: bool

    def load(self, device: str | None, dtype: str | None) -> Loaded:
        """Loads the target.

        Args:
            device: Where to run; by default ``cuda`` if available.
            dtype: Of the target; by default that of its files.

        Raises:
            FusionDetoxError: A part cannot be loaded.
        """
        import torch

        from fusion_detox.files.models import load_target
        from fusion_detox.generation.sampling import pad_token_id
        from fusion_detox.processor import FusionLogitsProcessor

        target, tokenizer = load_target(
            self.model,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            dtype=dtype,
            local_files_only=self.offline,
            revision=self.revision,
        )
        processor = FusionLogitsProcessor(
            self.calibrator,
            tokenizer,
            self.config,
            pad_token_id=pad_token_id(target, tokenizer),
            target=target,
            alignment=self.alignment,
        )
        return Loaded(target, tokenizer, processor)


def check_fused(
    model: str,
    calibrator: str,
    fusion: dict[str, Any],
    *,
    alignment: Path | None = None,
    chat: bool | None = None,
    system: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Checked:
    """Loads a calibrator and checks the settings, before a target is loaded.

    Args:
        model: See :class:`Checked`.
        calibrator: A shipped name, a folder, or a hub id.
        fusion: Fusion settings that replace those that the calibrator recommends.
        alignment: Folder that ``align --out`` wrote.
        chat: Whether prompts are requests; by default, if the target is a chat model.
        system: The system prompt of the chat.
        revision: See :class:`Checked`.
        offline: See :class:`Checked`.

    Raises:
        FusionDetoxError: A setting is wrong, or a part cannot be loaded.
    """
    from fusion_detox.alignment.store import load_alignment
    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.files.adapters import find_adapter
    from fusion_detox.files.models import load_tokenizer
    from fusion_detox.generation.chat import choose_chat

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
    return Checked(model, adapter, loaded, config, projection, chat, revision, offline)
