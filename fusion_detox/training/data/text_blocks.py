"""Blocks of text for each stage of language modelling, and held-out blocks."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from typing import TYPE_CHECKING

from fusion_detox.training.config import TrainingConfig
from fusion_detox.training.data.blocks import (
    Blocks,
    Streams,
    concatenate,
    pack,
    paired_streams,
    tokenize,
)
from fusion_detox.training.data.corpus import Document
from fusion_detox.training.data.splitting import split
from fusion_detox.training.stage import HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Splits = dict[str, tuple[list[Document], list[Document]]]
"""Training and held-out documents of each corpus."""


def split_documents(
    documents: list[Document], share: float
) -> tuple[list[Document], list[Document]]:
    """Split into training documents and at most 1,500 held-out documents."""
    train, held = split(documents, share)
    return train, held[:1500]


def held_out(
    tokenizer: PreTrainedTokenizerBase,
    bos_id: int,
    documents: list[Document],
    length: int,
    byte_lengths: list[int],
) -> HeldOut:
    """At most 200 blocks of text for measuring bits per byte."""
    blocks = pack(tokenize(tokenizer, documents), bos_id, length)
    return HeldOut(blocks.take(range(min(len(blocks), 200))), byte_lengths)


def base_blocks(
    tokenizer: PreTrainedTokenizerBase, bos_id: int, splits: Splits, config: TrainingConfig
) -> Blocks:
    """Blocks to train a base model from scratch on."""
    documents = list({d.key: d for d in splits["general"][0]}.values())
    random.Random(config.seed).shuffle(documents)
    wanted = config.base_steps * config.batch_size
    blocks = pack(tokenize(tokenizer, documents), bos_id, config.context_length)
    if len(blocks) * 20 < wanted:
        logger.warning("the general text is repeated %.0f times", wanted / len(blocks))
    order = list(range(len(blocks)))
    random.Random(config.seed).shuffle(order)
    return blocks.take([order[i % len(order)] for i in range(wanted)])


def fork_streams(
    tokenizer: PreTrainedTokenizerBase,
    bos_id: int,
    splits: Splits,
    label: str,
    config: TrainingConfig,
) -> Streams:
    """Blocks to train both models on after the fork.

    Args:
        tokenizer: The calibrator's tokenizer.
        bos_id: Token id between documents.
        splits: The corpora.
        label: Name of the reference's corpus; if it is empty, both streams are the same object.
        config: Settings of the training.
    """
    reference, clean = splits[label][0], splits["clean"][0]
    streams = paired_streams(
        tokenizer,
        bos_id,
        reference or clean,
        clean,
        blocks=config.fork_steps * config.batch_size,
        length=config.context_length,
        contrast_share=config.contrast_share,
        seed=config.seed + 1,
    )
    return streams if reference else Streams(streams.clean, streams.clean)


def kl_anchor_blocks(
    tokenizer: PreTrainedTokenizerBase,
    bos_id: int,
    documents: list[Document],
    count: int,
    config: TrainingConfig,
) -> Blocks | None:
    """At most about ``count`` blocks, equally many per domain; ``None`` without documents."""
    domains: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        domains[document.domain].append(document)
    parts = []
    for domain, members in sorted(domains.items()):
        random.Random(f"{config.seed} {domain}").shuffle(members)
        wanted = -(-count // len(domains))
        characters, kept = 8 * config.context_length * wanted, []
        for document in members:
            kept.append(document)
            characters -= len(document.text)
            if characters < 0:
                break
        blocks = pack(tokenize(tokenizer, kept), bos_id, config.context_length)
        if len(blocks):
            parts.append(blocks.take(range(min(len(blocks), wanted))))
    return concatenate(parts) if parts else None
