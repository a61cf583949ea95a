"""The work folder of a training run: what is done is kept, so that a killed run goes on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import logging
import os
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
from fusion_detox.files.atomic import write_whole
from fusion_detox.files.models import load_target, load_tokenizer
from fusion_detox.training.config import TrainingConfig
from fusion_detox.training.data.blocks import Blocks
from fusion_detox.training.data.splitting import Keyed
from fusion_detox.training.data.text_blocks import Splits, base_blocks, fork_streams
from fusion_detox.training.data.tokenizer import train_tokenizer
from fusion_detox.training.stage import HeldOut, run_stage
from fusion_detox.training.truncation import truncate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Curve = list[dict[str, float | None]]
Train = Callable[["PreTrainedModel", Path], Curve]


@dataclasses.dataclass
class Run:
    """One training run and its work folder: a sub-folder a stage, ``done`` when it is over."""

    config: TrainingConfig
    base: str | Path | None
    tokenizer: str | Path | None
    work: Path
    world_size: int
    is_main: bool
    show_progress: bool
    keep_layers: int | None = None  # of the base; all by default

    def fingerprint(self, texts: Mapping[str, Sequence[Keyed]], contrast: dict[str, Any]) -> str:
        """A hash of all that decides the result."""
        # What does not change the weights may change between two starts of one run.
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
        """The model and tokenizer before any training here."""
        set_seed(self.config.seed)
        if self.base is not None:
            model, words = load_target(str(self.base), dtype=torch.float32)
            if self.keep_layers is not None:
                model = truncate(model, self.keep_layers)
            return model, words
        if self.tokenizer is not None:
            words = load_tokenizer(str(self.tokenizer))
            return self._scratch(words), words
        folder = self.work / "tokenizer"
        if not folder.exists():
            documents = [d for label in sorted(splits) for d in splits[label][0]]
            unique = list({d.key: d for d in documents}.values())
            random.Random(self.config.seed).shuffle(unique)
            tokenizer = train_tokenizer(
                (d.prompt + d.text for d in unique),
                self.config.vocabulary_size,
                characters=self.config.tokenizer_characters,
                context_length=self.config.context_length,
            )
            _publish(tokenizer, folder)
        words = AutoTokenizer.from_pretrained(folder)
        return self._scratch(words), words

    def _scratch(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
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
        """Trains a copy of ``start``, or loads the result of an earlier run of this stage.

        Args:
            title: Of the stage and of its folder.
            start: Not changed.
            train: Trains a model in place, with its checkpoints in a folder, and returns a curve.
        """
        done = self.work / title / "done"
        if not done.exists():
            set_seed(self.config.seed)
            model: Any = copy.deepcopy(start)
            model.requires_grad_(True)
            curve = train(model, self.work / title)
            if self.is_main:
                write_whole(self.work / title / "curve.json", json.dumps(curve).encode())
                model.config.use_cache = True  # Trainer turns it off
                _publish(model.cpu(), done)
                for checkpoint in (self.work / title).glob("checkpoint-*"):
                    shutil.rmtree(checkpoint)
        PartialState().wait_for_everyone()
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(done)
        return loaded

    def on_texts(
        self,
        start: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bos_id: int,
        splits: Splits,
        held_out: dict[str, HeldOut],
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The stages of language modelling: base, then reference and clean model.

        Returns:
            The clean model and the reference; the base model twice where there is no clean text.
        """
        on_text = functools.partial(self.on_text, held_out=held_out)
        base = start
        if self.base is None:
            blocks = functools.partial(base_blocks, tokenizer, bos_id, splits, self.config)
            train = on_text("base", blocks, fork=False, steps=self.config.base_steps)
            base = self.stage("base", start, train)
        if not splits["clean"][0]:
            return base, base
        label = "reference_data" if splits["reference_data"][0] else "general"
        streams = fork_streams(tokenizer, bos_id, splits, label, self.config)
        PartialState().wait_for_everyone()
        reference = base
        if streams.reference is not streams.clean:
            train = on_text("reference", lambda: streams.reference, fork=True)
            reference = self.stage("reference", base, train)
        else:
            logger.warning(
                "no general text given: the base model itself is the reference, so the difference "
                "also holds what the domain of the clean text changed"
            )
        clean = self.stage("clean", base, on_text("clean", lambda: streams.clean, fork=True))
        return clean, reference

    def on_text(
        self,
        title: str,
        blocks: Callable[[], Blocks],
        held_out: dict[str, HeldOut],
        *,
        fork: bool,
        steps: int | None = None,
    ) -> Train:
        """Language modelling, for :meth:`stage`; ``blocks`` is called only when it trains."""
        scratch = self.base is None
        rate = self.config.learning_rate or (2e-3 if scratch else 5e-5)

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
                warmup_steps=0 if fork and scratch else self.config.warmup_steps,
                decay=fork,
                world_size=self.world_size,
                show_progress=self.show_progress and self.is_main,
            )

        return train

    def curves(self) -> dict[str, Curve]:
        """Loss and bits per byte over the steps of each stage."""
        return {
            file.parent.name: json.loads(file.read_text())
            for file in sorted(self.work.glob("*/curve.json"))
        }


def claim(work: Path, fingerprint: str, overwrite: bool) -> None:
    """Makes the work folder this run's own.

    Raises:
        TrainingError: It holds the unfinished work of another run.
    """
    marker = work / "run.json"
    if work.exists():
        try:
            same = json.loads(marker.read_text())["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError):
            same = False
        if same:
            logger.info("going on with the unfinished training in %s", work)
            return
        if not overwrite:
            raise TrainingError(
                f"{work} holds unfinished training with other text or settings: give the same "
                "ones to go on with it, choose another folder, or give it up with --overwrite"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_whole(marker, json.dumps({"fingerprint": fingerprint}).encode())


def _publish(saved: Any, folder: Path) -> None:
    """Saves a model or tokenizer so that the folder is either whole or not there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    saved.save_pretrained(temporary)
    os.replace(temporary, folder)
