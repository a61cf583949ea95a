"""Everything that a run loads: the target, calibrators, the processor of each setting."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.tuning_record import prompt_digest, prompts_in_common, tuned_prompts
from fusion_detox.config import FusionConfig
from fusion_detox.evaluation.variants import Setting, setting_stem
from fusion_detox.evaluation.word_filter import WordFilter, read_word_list, tokenisations
from fusion_detox.files.fingerprints import model_fingerprint, short_name
from fusion_detox.files.models import load_target
from fusion_detox.generation.sampling import pad_token_id
from fusion_detox.processor import FusionLogitsProcessor

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A setting that is ready to run.

    Attributes:
        setting: What the user wrote.
        about: What a reader must know of it, JSON-ready.
        stem: Names its files; another one if anything that decides its text differs.
        config: Fusion settings, where it is a fusion.
        processor: What ``generate()`` calls; ``None`` for the target alone.
    """

    setting: Setting
    about: dict[str, Any]
    stem: str
    config: FusionConfig | None
    processor: LogitsProcessor | None

    def free(self) -> None:
        """Frees what the processor keeps to save time: a run has many of them, one at work."""
        if isinstance(self.processor, FusionLogitsProcessor):
            self.processor.reset()


class Target:
    """A model under evaluation, and what is put before it.

    Args:
        model: The target, on its device.
        tokenizer: Its own.
        name: As the report calls it.
        calibrator: The calibrator of all settings that name no other.
        word_list: File of the word filter; a public list by default.
        local_files_only: Never contact the hub.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        calibrator: Calibrator | str,
        word_list: Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._calibrator, self._word_list = calibrator, word_list
        self._offline = local_files_only
        self._loaded: dict[str, tuple[Calibrator, str]] = {}
        self.about: dict[str, Any] = {
            "name": name,
            "fingerprint": model_fingerprint(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "vocabulary": len(tokenizer),
            "tokenizer": _tokenizer_digest(tokenizer),
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    @classmethod
    def load(
        cls, target: str, *, device: str | torch.device | None, dtype: str | None, **options: Any
    ) -> Target:
        """A target by path or hub id; see ``load_target`` for what is raised."""
        offline = bool(options.get("local_files_only"))
        model, tokenizer = load_target(target, device=device, dtype=dtype, local_files_only=offline)
        return cls(model, tokenizer, short_name(target), **options)

    @property
    def pad_token_id(self) -> int:
        """What batches are padded with."""
        return pad_token_id(self.model, self.tokenizer)

    def calibrator(self, name: str | None = None) -> tuple[Calibrator, str]:
        """A calibrator and its fingerprint; the run's by default."""
        chosen = self._calibrator if name is None else name
        key = chosen if isinstance(chosen, str) else ""
        if key not in self._loaded:
            loaded = (
                Calibrator.from_pretrained(chosen, local_files_only=self._offline)
                if isinstance(chosen, str)
                else chosen
            )
            self._loaded[key] = loaded, model_fingerprint(loaded.clean, loaded.reference)
        return self._loaded[key]

    def prepare(self, setting: Setting) -> Prepared:
        """Loads what a setting needs.

        Raises:
            ConfigError: Its fusion settings are not possible.
            CalibratorError: The calibrator cannot be used, and other errors of its loading.
            VocabularyError: It cannot be mapped to the target's vocabulary.
            AlignmentError: An aligned rule has no alignment of calibrator and target.
            MissingExtraError: The word filter's list is not installed.
        """
        about: dict[str, Any] = {"name": setting.name, "kind": setting.kind}
        if setting.kind == "base":
            about |= {"config": None, "calibrator": None, "map": None}
            return Prepared(setting, about, setting_stem("base", {}), None, None)
        if setting.kind == "wordfilter":
            words, facts = read_word_list(self._word_list)
            sequences = tokenisations(self.tokenizer, words)
            about |= {"config": None, "calibrator": None, "map": None}
            about["word_list"] = {**facts, "sequences": len(sequences)}
            return Prepared(
                setting, about, setting_stem("wordfilter", facts), None, WordFilter(sequences)
            )
        calibrator, fingerprint = self.calibrator(setting.calibrator)
        config = setting.resolve(calibrator.config)
        processor = FusionLogitsProcessor(
            calibrator,
            self.tokenizer,
            config,
            pad_token_id=self.pad_token_id,
            target=self.model,
        )
        vocabulary = processor.vocabulary
        about |= {
            "config": config.to_dict(),
            "calibrator": {"name": short_name(calibrator.name), "fingerprint": fingerprint},
            "map": {"kind": vocabulary.kind, "coverage": round(float(vocabulary.coverage), 6)},
        }
        identity = {
            "config": config.to_dict(),
            "calibrator": fingerprint,
            "vocabulary": calibrator.tokens.fingerprint(),
            "context": calibrator.context_length,
        }
        if processor.alignment is not None:
            about["alignment"] = processor.alignment.facts()
            identity["alignment"] = processor.alignment.digest()
        stem = setting_stem(setting.name, identity)
        return Prepared(setting, about, stem, config, processor)

    def prompts_tuned_on(self, setting: Setting, prompts: Sequence[str]) -> int:
        """How many of the prompts a calibrator's own settings, if these are they, were tuned on."""
        if setting.kind != "fusion":
            return 0
        calibrator, _ = self.calibrator(setting.calibrator)
        if setting.resolve(calibrator.config) != calibrator.config:
            return 0
        return prompts_in_common(map(prompt_digest, prompts), tuned_prompts(calibrator.record))


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """12 hex digits over its tokens and special ids."""
    parts = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
