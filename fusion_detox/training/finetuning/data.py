"""What ``finetune`` reads: paraphrase sets and general text, a part of both held out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import DataError
from fusion_detox.training.contrastive.batches import (
    AnchorDraws,
    EncodedSet,
    check_sets,
    encode_sets,
)
from fusion_detox.training.contrastive.config import ContrastiveConfig
from fusion_detox.training.contrastive.measure import HeldOutAnchors
from fusion_detox.training.data.blocks import Blocks, byte_lengths, pack, start_id, tokenize
from fusion_detox.training.data.corpus import Columns, Document, read_documents
from fusion_detox.training.data.pairs import ParaphraseSet, read_pairs
from fusion_detox.training.data.splitting import split
from fusion_detox.training.finetuning.config import FinetuneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sources = Sequence[str | Path]
_MOST_ANCHORS, _MOST_BLOCKS = 300, 100


@dataclasses.dataclass(frozen=True)
class FinetuneData:
    """Paraphrase sets and general text, each without and with what is only measured."""

    sets: list[ParaphraseSet]
    held_sets: list[ParaphraseSet]
    general: list[Document]
    held_general: list[Document]

    @classmethod
    def read(
        cls, pairs: Sources, general: Sources, columns: Columns, held_out: float
    ) -> FinetuneData:
        """Reads and splits by content, so that a text is never on both sides.

        Raises:
            DataError: A file is broken, or there is no usable set.
            DataFileError: A file is missing.
        """
        sets = list({one.key: one for one in read_pairs(pairs)}.values())
        check_sets(sets)
        documents = read_documents(general, columns) if general else []
        return cls(*split(sets, held_out), *split(documents, held_out))

    def fingerprint(self, settings: dict[str, Any]) -> str:
        """A hash of all that decides a run's result."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        keys = [one.key for one in (*self.sets, *self.held_sets)]
        keys += [document.key for document in (*self.general, *self.held_general)]
        for key in keys:
            digest.update(key.encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """How much there is, for the record."""
        return {
            "anchors": len(self.sets),
            "positives": sum(len(one.positives) for one in self.sets),
            "negatives": sum(len(one.negatives) for one in self.sets),
            "held_out_anchors": len(self.held_sets),
            "general_documents": len(self.general),
            "held_out_general_documents": len(self.held_general),
        }


class EncodedData:
    """The same as token ids of one model.

    Raises:
        DataError: A wording has no token, or no set has a negative though some are to be drawn.
        TrainingError: The tokenizer has no token to begin a text with.
    """

    def __init__(
        self,
        data: FinetuneData,
        tokenizer: PreTrainedTokenizerBase,
        config: FinetuneConfig,
        contrast: ContrastiveConfig,
    ) -> None:
        self.config, self.contrast = config, contrast
        self.bos_id = start_id(tokenizer)
        length = config.context_length
        self.sets = encode_sets(tokenizer, data.sets, bos_id=self.bos_id, context_length=length)
        if contrast.negatives and not any(one.negatives for one in self.sets):
            raise DataError(
                "no paraphrase set has a negative: give toxic wordings, or --negatives 0 with an "
                "--lm-weight to learn from the positives alone"
            )
        held = data.held_sets[:_MOST_ANCHORS]
        self.held: list[EncodedSet] = (
            encode_sets(tokenizer, held, bos_id=self.bos_id, context_length=length) if held else []
        )
        self.general = self._blocks(tokenizer, data.general)
        self.held_general = self._blocks(tokenizer, data.held_general, _MOST_BLOCKS)
        # Only bits a byte of general text need them, and not every tokenizer can tell.
        self.byte_lengths = byte_lengths(tokenizer) if self.held_general else []

    def _blocks(
        self, tokenizer: PreTrainedTokenizerBase, documents: list[Document], most: int | None = None
    ) -> Blocks | None:
        if not documents:
            return None
        blocks = pack(tokenize(tokenizer, documents), self.bos_id, self.config.context_length)
        return blocks if most is None else blocks.take(range(min(len(blocks), most)))

    def draws(self, steps: int) -> AnchorDraws:
        """The anchors of a contrastive run of that many steps."""
        objective = self.config.objective
        assert objective != "dpo"
        _, kl_weight = self.contrast.anchor_weights(objective)
        return AnchorDraws(
            self.sets,
            steps * self.config.batch_size,
            positives=self.contrast.positives,
            negatives=self.contrast.negatives,
            general=self.general if kl_weight else None,
            seed=self.config.seed,
        )

    def measure(self) -> HeldOutAnchors:
        """What is measured on the held-out part."""
        return HeldOutAnchors(
            self.held,
            self.held_general,
            self.byte_lengths,
            autocast=self.config.precision != "float32",
        )
