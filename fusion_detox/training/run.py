"""The stages of a training run and its work folder, from which a killed run resumes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import logging
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from fusion_detox.errors import TrainingError
from fusion_detox.files.adapters import refuse_adapter
from fusion_detox.files.atomic import replacing_folder, write_whole
from fusion_detox.files.models import load_target, load_tokenizer
from fusion_detox.training.config import TrainingConfig
from fusion_detox.training.data.blocks import Blocks
from fusion_detox.training.data.splitting import Keyed
from fusion_detox.training.data.text_blocks import Splits, base_blocks, fork_streams
from fusion_detox.training.data.tokenizer import train_tokenizer
from fusion_detox.training.output import MARKER, discard
from fusion_detox.training.stage import HeldOut, run_stage
from fusion_detox.training.truncation import truncate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Curve = list[dict[str, float | None]]
Train = Callable[["PreTrainedModel", Path], Curve]


@dataclasses.dataclass
class Run:
    """One training run.

    Attributes:
        config: Settings of the training.
        base: Model to start from; ``None`` for a model from scratch.
        tokenizer: Tokenizer of a model from scratch; one is trained by default.
        work: Work folder, with a subfolder per stage, whose ``done`` holds the finished model.
        world_size: Number of processes.
        is_main: Whether this is the main process.
        show_progress: Whether to show progress bars.
        keep_layers: Number of the base's layers to keep; all by default.
    """

    config: TrainingConfig
    base: str | Path | None
    tokenizer: str | Path | None
    work: Path
    world_size: int
    is_main: bool
    show_progress: bool
    keep_layers: int | None = None

    def fingerprint(self, texts: Mapping[str, Sequence[Keyed]], contrast: dict[str, Any]) -> str:
        """Hash everything that determines the result."""
        # These do not change the result, so a resumed run may change them.
        free = ("device", "save_dtype", "save_every", "evaluate_every")
        settings = {k: v for k, v in self.config.to_dict().items() if k not in free}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(f"{self.base} {self.tokenizer}".encode())
        if self.keep_layers is not None:
            digest.update(f"first {self.keep_layers} layers".encode())
        digest.update(json.dumps(contrast, sort_keys=True).encode())
        for label, documents in sorted(texts.items()):
            digest.update(label.encode())
            for document in documents:
                digest.update(document.key.encode())
        return digest.hexdigest()

    def start(self, splits: Splits) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the model and tokenizer before any training."""
        set_seed(self.config.seed)
        if self.base is not None:
            refuse_adapter(self.base, "training a calibrator")
            model, tokenizer = load_target(str(self.base), dtype=torch.float32)
            if self.keep_layers is not None:
                model = truncate(model, self.keep_layers)
            return model, tokenizer
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(str(self.tokenizer))
            return self._from_scratch(tokenizer), tokenizer
        folder = self.work / "tokenizer"
        if not folder.exists():
            documents = [d for label in sorted(splits) for d in splits[label][0]]
            unique = list({d.key: d for d in documents}.values())
            random.Random(self.config.seed).shuffle(unique)
            trained = train_tokenizer(
                (d.prompt + d.text for d in unique),
                self.config.vocabulary_size,
                characters=self.config.tokenizer_characters,
                context_length=self.config.context_length,
            )
            _save(trained, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return self._from_scratch(tokenizer), tokenizer

    def _from_scratch(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.config.hidden_size,
                intermediate_size=self.config.intermediate_size,
                num_hidden_layers=self.config.layers,
                num_attention_heads=self.config.heads,
                max_position_embeddings=self.config.context_length,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )

    def stage(self, title: str, start: PreTrainedModel, train: Train) -> PreTrainedModel:
        """Train a copy of ``start``, or load the result of an earlier run of this stage.

        Args:
            title: Name of the stage and of its folder.
            start: The model to copy.
            train: Trains a model in place, writes checkpoints to a folder, and returns a curve.
        """
        done = self.work / title / "done"
        if not done.exists():
            set_seed(self.config.seed)
            model: Any = copy.deepcopy(start)
            model.requires_grad_(True)
            curve = train(model, self.work / title)
            if self.is_main:
                write_whole(self.work / title / "curve.json", json.dumps(curve).encode())
                model.config.use_cache = True  # Trainer disables it
                _save(model.cpu(), done)
                for checkpoint in (self.work / title).glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
        PartialState().wait_for_everyone()
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(done)
        return loaded

    def language_modelling(
        self,
        start: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bos_id: int,
        splits: Splits,
        held_out: dict[str, HeldOut],
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Run the stages of language modelling: base, reference and clean model.

        Returns:
            The clean model and the reference; without clean text, the base model twice.
        """
        on_blocks = functools.partial(self._on_blocks, held_out=held_out)
        base = start
        if self.base is None:
            blocks = functools.partial(base_blocks, tokenizer, bos_id, splits, self.config)
            train = on_blocks("base", blocks, fork=False, steps=self.config.base_steps)
            base = self.stage("base", start, train)
        if not splits["clean"][0]:
            return base, base
        label = "reference_data" if splits["reference_data"][0] else "general"
        streams = fork_streams(tokenizer, bos_id, splits, label, self.config)
        PartialState().wait_for_everyone()
        reference = base
        if streams.reference is not streams.clean:
            train = on_blocks("reference", lambda: streams.reference, fork=True)
            reference = self.stage("reference", base, train)
        else:
            logger.warning(
                "without general text, the base model is the reference, so the difference also "
                "includes the effect of the clean text's domain; give general text to avoid this"
            )
        clean = self.stage("clean", base, on_blocks("clean", lambda: streams.clean, fork=True))
        return clean, reference

    def _on_blocks(
        self,
        title: str,
        blocks: Callable[[], Blocks],
        held_out: dict[str, HeldOut],
        *,
        fork: bool,
        steps: int | None = None,
    ) -> Train:
        """Language modelling for :meth:`stage`; ``blocks`` is called only if the stage trains."""
        from_scratch = self.base is None
        rate = self.config.learning_rate or (2e-3 if from_scratch else 5e-5)

        def train(model: PreTrainedModel, folder: Path) -> Curve:
            return run_stage(
                title,
                model,
                blocks(),
                held_out,
                self.config,
                folder,
                steps=self.config.fork_steps if steps is None else steps,
                learning_rate=rate,
                warmup_steps=0 if fork and from_scratch else self.config.warmup_steps,
                decay=fork,
                world_size=self.world_size,
                show_progress=self.show_progress and self.is_main,
            )

        return train

    def curves(self) -> dict[str, Curve]:
        """Return the loss and bits per byte by step of each stage."""
        return {
            file.parent.name: json.loads(file.read_text())
            for file in sorted(self.work.glob("*/curve.json"))
        }


def claim(work: Path, fingerprint: str, overwrite: bool) -> None:
    """Create the work folder, or accept an existing one of the same run.

    Raises:
        TrainingError: The folder holds the unfinished work of another run.
    """
    marker = work / MARKER
    # The marker is written first; what starts with a dot is left of a write that was killed.
    if work.exists() and not all(path.name.startswith(".") for path in work.iterdir()):
        try:
            same = json.loads(marker.read_text())["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError):
            same = False
        if same:
            logger.info("resuming the unfinished training in %s", work)
            return
        if not overwrite:
            raise TrainingError(
                f"{work} holds unfinished training with other text or settings: give the same "
                "ones to resume it, choose another output, or discard it with --overwrite"
            )
        discard(work)
    work.mkdir(parents=True, exist_ok=True)
    write_whole(marker, json.dumps({"fingerprint": fingerprint}).encode())


def _save(saved: Any, folder: Path) -> None:
    """Save a model or tokenizer to a folder that is either complete or missing."""
    with replacing_folder(folder) as new:
        saved.save_pretrained(new)
