"""Documents in, the blocks of each stage of language modelling out, a part held out."""

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


def split_documents(
    documents: list[Document], share: float
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, of the latter as many as measuring needs."""
    rest, held = split(documents, share)
    return rest, held[:1500]


def held_out(
    tokenizer: PreTrainedTokenizerBase,
    bos_id: int,
    documents: list[Document],
    length: int,
    lengths: list[int],
) -> HeldOut:
    """Text on which bits a byte are measured."""
    blocks = pack(tokenize(tokenizer, documents), bos_id, length)
    keep = min(len(blocks), 200)
    return HeldOut(blocks.take(range(keep)), lengths)


def base_blocks(
    tokenizer: PreTrainedTokenizerBase, bos_id: int, splits: Splits, config: TrainingConfig
) -> Blocks:
    """What a base model from scratch is trained on."""
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
    """What both models are trained on after the fork; one stream without reference text."""
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
    """About ``count`` blocks at most, as many of each domain, or ``None`` without documents."""
    domains: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        domains[document.domain].append(document)
    parts = []
    for domain, members in sorted(domains.items()):
        random.Random(f"{config.seed} {domain}").shuffle(members)
        characters, kept = 8 * config.context_length * -(-count // len(domains)), []
        for document in members:
            kept.append(document)
            characters -= len(document.text)
            if characters < 0:
                break
        blocks = pack(tokenize(tokenizer, kept), bos_id, config.context_length)
        parts.append(blocks.take(range(min(len(blocks), -(-count // len(domains))))))
    found = concatenate(parts) if parts else None
    return found if found is not None and len(found) else None
