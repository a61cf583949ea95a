"""Documents in, equal blocks of token ids with exact label masks out."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fusion_detox.errors import TrainingError
from fusion_detox.training.data.corpus import Document
from fusion_detox.training.loss import IGNORED
from fusion_detox.vocabulary.token_table import TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]
Item = TypeVar("Item")


class Blocks(Dataset[dict[str, Tensor]]):
    """Rows of ``length`` token ids. Each begins with BOS, as every window does at decoding.

    Attributes:
        ids: ``(blocks, length)`` token ids.
        labels: ``(blocks, length)`` the same ids, ``IGNORED`` where a token does not count: the
            leading BOS, prompts and padding.
    """

    def __init__(self, ids: Ids, labels: Ids, padded: Ids | None = None) -> None:
        self.ids, self.labels = ids, labels
        self._lengths = padded

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {
            "input_ids": torch.from_numpy(self.ids[index].astype(np.int64)),
            "labels": torch.from_numpy(self.labels[index].astype(np.int64)),
        }
        if self._lengths is not None:
            mask = np.arange(self.ids.shape[1]) < self._lengths[index]
            row["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return row

    def take(self, order: Sequence[int] | Ids) -> Blocks:
        """The blocks of ``order``, which may repeat."""
        index = np.asarray(order, dtype=np.int64)
        lengths = None if self._lengths is None else self._lengths[index]
        return Blocks(self.ids[index], self.labels[index], lengths)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> list[tuple[list[int], int]]:
    """Token ids of each document, and the number of leading ones that are prompt.

    Prompt and completion are tokenised as one text, as they are read at decoding. A token that
    straddles the border counts as completion, because it holds some of it.
    """
    rows: list[tuple[list[int], int]] = []
    for start in range(0, len(documents), 2000):
        part = documents[start : start + 2000]
        prompts = any(document.prompt for document in part)
        encoded = tokenizer(
            [document.prompt + document.text for document in part],
            add_special_tokens=False,
            return_offsets_mapping=prompts,
            return_attention_mask=False,
            verbose=False,
        )
        for index, (document, ids) in enumerate(zip(part, encoded["input_ids"], strict=True)):
            skipped = 0
            if document.prompt:
                ends = [end for _, end in encoded["offset_mapping"][index]]
                skipped = sum(end <= len(document.prompt) for end in ends)
            rows.append((ids, skipped))
    return rows


def pack(rows: Iterable[tuple[list[int], int]], bos_id: int, length: int) -> Blocks:
    """Lays documents end to end, a BOS before each, and cuts them into blocks.

    The last block is padded; the padding is masked and does not count.
    """
    stream: list[int] = []
    counts: list[bool] = []
    for ids, skipped in rows:
        stream.append(bos_id)
        stream.extend(ids)
        counts.append(skipped == 0)
        counts.extend([False] * skipped + [True] * (len(ids) - skipped))
    body = length - 1
    blocks = -(-len(stream) // body)
    flat = np.full(blocks * body, bos_id, dtype=np.int32)
    flat[: len(stream)] = stream
    mask = np.zeros(blocks * body, dtype=bool)
    mask[: len(stream)] = counts
    rows_of_ids = np.full((blocks, length), bos_id, dtype=np.int32)
    rows_of_ids[:, 1:] = flat.reshape(blocks, body)
    labels = np.full((blocks, length), IGNORED, dtype=np.int32)
    labels[:, 1:] = np.where(mask, flat, IGNORED).reshape(blocks, body)
    lengths = np.full(blocks, length, dtype=np.int32)
    if blocks:
        lengths[-1] -= blocks * body - len(stream)
    learnable = (labels != IGNORED).any(axis=1)
    return Blocks(rows_of_ids[learnable], labels[learnable], lengths[learnable])


@dataclasses.dataclass
class Streams:
    """The blocks that the reference and the clean model are trained on, position by position."""

    reference: Blocks
    clean: Blocks


def paired_streams(
    tokenizer: PreTrainedTokenizerBase,
    bos_id: int,
    reference: Sequence[Document],
    clean: Sequence[Document],
    *,
    blocks: int,
    length: int,
    contrast_share: float | None,
    seed: int,
) -> Streams:
    """Two training streams that differ only where the two corpora do.

    What both corpora hold is packed once and stands at the same places of both streams, so that
    the noise of training on it is the same in both models and cancels in their difference. Where
    the reference sees a block of text that only it has, the clean model sees clean text of the
    same domain.

    Args:
        tokenizer: The calibrator's.
        bos_id: Its id between documents.
        reference: Documents of the reference's corpus.
        clean: Documents of the clean corpus.
        blocks: Length of both streams.
        length: Tokens of a block.
        contrast_share: Share of the reference's blocks that only it sees; ``None`` for the share
            that the corpora have by themselves.
        seed: Of the order.
    """
    clean_keys = {document.key for document in clean}
    reference_keys = {document.key for document in reference}
    groups: dict[tuple[str, str], list[Document]] = defaultdict(list)
    for document in clean:
        group = "common" if document.key in reference_keys else "clean"
        groups[group, document.domain].append(document)
    for document in reference:
        if document.key not in clean_keys:
            groups["reference", document.domain].append(document)

    packed: dict[tuple[str, str], Blocks] = {
        name: pack(tokenize(tokenizer, members), bos_id, length)
        for name, members in sorted(groups.items())
    }
    parts = [part for part in packed.values() if len(part)]
    everything = concatenate(parts)
    spans: dict[tuple[str, str], list[int]] = {}
    offset = 0
    for name, part in packed.items():
        spans[name] = list(range(offset, offset + len(part)))
        offset += len(part)

    rng = random.Random(seed)
    common = [i for (group, _), span in spans.items() if group == "common" for i in span]
    only: list[tuple[int, str]] = [
        (i, domain) for (group, domain), span in spans.items() if group == "reference" for i in span
    ]
    natural = len(only) / max(len(only) + len(common), 1)
    share = natural if contrast_share is None else contrast_share
    differing = blocks if not common else (round(blocks * share) if only else 0)

    fillers: dict[str, list[int]] = defaultdict(list)
    for (group, domain), span in spans.items():
        if group != "reference":
            fillers[domain] += span
    any_filler = [i for span in fillers.values() for i in span]

    shared = _draw(rng, common, blocks - differing)
    own = _draw(rng, only, differing) if only else []
    pools = {domain: _draw(rng, fillers[domain] or any_filler, differing) for _, domain in own}
    pairs = [(i, i) for i in shared] + [(i, pools[domain].pop()) for i, domain in own]
    if not own and differing:
        pairs += [(i, i) for i in _draw(rng, any_filler, differing)]
    rng.shuffle(pairs)
    return Streams(
        reference=everything.take([left for left, _ in pairs]),
        clean=everything.take([right for _, right in pairs]),
    )


def concatenate(parts: Sequence[Blocks]) -> Blocks:
    """All blocks of all parts, in order."""
    return Blocks(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part._lengths for part in parts if part._lengths is not None]),
    )


def _draw(rng: random.Random, pool: Sequence[Item], count: int) -> list[Item]:
    """``count`` members in random order, each used about equally often."""
    drawn: list[Item] = []
    while len(drawn) < count and pool:
        drawn += rng.sample(pool, min(len(pool), count - len(drawn)))
    return drawn


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text begins with: BOS, or EOS where there is none.

    Raises:
        TrainingError: There is neither.
    """
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    raise TrainingError("the tokenizer has neither a BOS nor an EOS token to begin a text with")


def byte_lengths(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Bytes of each token id, 0 for special ones."""
    pieces = TokenTable.from_tokenizer(tokenizer).token_bytes
    return [0 if piece is None else len(piece) for piece in pieces]
