"""The target of a run, with the calibrator and the processor of each variant."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.calibrator.calibrator import Calibrator
from fusion_detox.calibrator.tuning_record import prompt_digest, prompts_in_common, tuned_prompts
from fusion_detox.evaluation.variants import Variant, variant_stem
from fusion_detox.evaluation.word_filter import WordFilter, read_word_list, tokenisations
from fusion_detox.files.fingerprints import model_fingerprint, short_name
from fusion_detox.files.models import load_target
from fusion_detox.generation.sampling import pad_token_id
from fusion_detox.processor import FusionLogitsProcessor

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A variant that is ready to run.

    Attributes:
        variant: What the user asked for.
        about: JSON-ready facts for the report.
        stem: Name of the variant's files; differs if anything that affects a continuation differs.
        processor: The logits processor; ``None`` for the target alone.
    """

    variant: Variant
    about: dict[str, Any]
    stem: str
    processor: LogitsProcessor | None

    def free(self) -> None:
        """Frees the processor's caches, since only one of a run's many processors is in use."""
        if isinstance(self.processor, FusionLogitsProcessor):
            self.processor.reset()


class Target:
    """A model under evaluation, with its calibrators.

    Args:
        model: The target, on its device.
        tokenizer: The target's tokenizer.
        name: The target's name in the report.
        calibrator: The calibrator of all variants that name no other.
        word_list: File of words for the word filter; by default, a public list.
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

    def calibrator(self, name: str | None = None) -> tuple[Calibrator, str]:
        """A calibrator (by default the run's) and its fingerprint."""
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

    def chat(self, system: str | None) -> dict[str, Any]:
        """JSON-ready facts about how requests are put to the target."""
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:12]
        return {"system": system, "template": template}

    def prepare(self, variant: Variant) -> Prepared:
        """Loads what a variant needs.

        Raises:
            ConfigError: The fusion settings are invalid.
            CalibratorError: The calibrator cannot be used. Other loading errors are raised too.
            VocabularyError: The calibrator cannot be mapped to the target's vocabulary.
            AlignmentError: An aligned rule lacks an alignment of calibrator and target.
            MissingExtraError: The public word list is not installed.
        """
        about: dict[str, Any] = {
            **{"name": variant.name, "kind": variant.kind},
            **{"config": None, "calibrator": None, "map": None},
        }
        if variant.kind == "base":
            return Prepared(variant, about, variant_stem("base", {}), None)
        if variant.kind == "wordfilter":
            words, facts = read_word_list(self._word_list)
            sequences = tokenisations(self.tokenizer, words)
            about["word_list"] = {**facts, "sequences": len(sequences)}
            stem = variant_stem("wordfilter", facts)
            return Prepared(variant, about, stem, WordFilter(sequences))
        calibrator, fingerprint = self.calibrator(variant.calibrator)
        config = variant.resolve(calibrator.config)
        processor = FusionLogitsProcessor(
            calibrator,
            self.tokenizer,
            config,
            pad_token_id=pad_token_id(self.model, self.tokenizer),
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
        if calibrator.words:
            about["calibrator"]["words"] = len(calibrator.words)
            identity["words"] = calibrator.words
        if processor.alignment is not None:
            about["alignment"] = processor.alignment.facts()
            identity["alignment"] = processor.alignment.digest()
        return Prepared(variant, about, variant_stem(variant.name, identity), processor)

    def prompts_tuned_on(self, variant: Variant, prompts: Sequence[str]) -> int:
        """The number of these prompts that were used to tune the variant's settings.

        Only the settings that a calibrator recommends can have been tuned.
        """
        if variant.kind != "fusion":
            return 0
        calibrator, _ = self.calibrator(variant.calibrator)
        if variant.resolve(calibrator.config) != calibrator.config:
            return 0
        return prompts_in_common(map(prompt_digest, prompts), tuned_prompts(calibrator.record))


def load_for_measuring(
    name: str, *, device: Any, dtype: str | None = None, local_files_only: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model; on the CPU, 16-bit weights become float32 if memory permits.

    Most CPUs compute in float32 several times faster than in bfloat16.

    Args:
        name: Folder or hub id.
        device: The device.
        dtype: A dtype to keep to.
        local_files_only: Never contact the hub.

    Raises:
        FusionDetoxError: The model cannot be loaded.
    """
    import psutil
    import torch

    model, tokenizer = load_target(
        name, device=device, dtype=dtype, local_files_only=local_files_only
    )
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    narrow = model.dtype in (torch.bfloat16, torch.float16)
    fits = needed <= psutil.virtual_memory().total // 2
    if dtype is None and model.device.type == "cpu" and narrow and fits:
        whole: Any = model  # its type stubs do not fit
        whole.to(torch.float32)
    return model, tokenizer


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """12 hex digits of a hash of the tokens and special ids."""
    parts = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
