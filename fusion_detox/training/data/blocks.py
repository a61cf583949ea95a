"""Pack documents into blocks of token ids of equal length, with exact label masks."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

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
    """Rows of token ids, each starting with BOS, as every window does when decoding.

    Attributes:
        ids: ``(blocks, length)`` token ids.
        labels: ``(blocks, length)`` the same ids, but ``IGNORED`` for tokens that do not count: the
            leading BOS, prompts and padding.
        lengths: ``(blocks,)`` tokens of each block before its padding.
    """

    def __init__(self, ids: Ids, labels: Ids, lengths: Ids) -> None:
        self.ids, self.labels, self.lengths = ids, labels, lengths

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = np.arange(self.ids.shape[1]) < self.lengths[index]
        return {
            "input_ids": torch.from_numpy(self.ids[index].astype(np.int64)),
            "labels": torch.from_numpy(self.labels[index].astype(np.int64)),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }

    def take(self, order: Sequence[int]) -> Blocks:
        """Select blocks by their indices, which may repeat."""
        index = np.asarray(order, dtype=np.int64)
        return Blocks(self.ids[index], self.labels[index], self.lengths[index])


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> list[tuple[list[int], int]]:
    """Return each document's token ids, and how many leading ones belong to its prompt.

    Prompt and completion are tokenised as one text, as when decoding. A token that spans both
    counts as completion.
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
            prompt_tokens = 0
            if document.prompt:
                ends = [end for _, end in encoded["offset_mapping"][index]]
                prompt_tokens = sum(end <= len(document.prompt) for end in ends)
            rows.append((ids, prompt_tokens))
    return rows


def pack(rows: Iterable[tuple[list[int], int]], bos_id: int, length: int) -> Blocks:
    """Concatenate documents, with BOS before each, and cut them into blocks.

    The last block is padded. Padding is masked and does not count.

    Args:
        rows: Documents as :func:`tokenize` returns them.
        bos_id: Token id that begins documents and blocks.
        length: Tokens per block.
    """
    stream: list[int] = []
    counts: list[bool] = []
    for ids, prompt_tokens in rows:
        stream += [bos_id, *ids]
        counts.append(prompt_tokens == 0)
        counts += [False] * prompt_tokens + [True] * (len(ids) - prompt_tokens)
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


class Streams(NamedTuple):
    """The training blocks of both models, position by position."""

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
    """Build two training streams that differ only where the two corpora differ.

    Text that is in both corpora is packed once and takes the same positions in both streams. The
    noise of training on it is then the same in both models and cancels in their difference. If a
    block holds text that only the reference's corpus has, the clean model sees clean text of the
    same domain instead.

    Args:
        tokenizer: The calibrator's tokenizer.
        bos_id: Token id between documents.
        reference: Documents of the reference's corpus.
        clean: Documents of the clean corpus.
        blocks: Blocks per stream.
        length: Tokens per block.
        contrast_share: Share of the reference's blocks that only it sees; by default, their share
            of the corpora.
        seed: Seed of the order.
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

    packed = {
        name: pack(tokenize(tokenizer, members), bos_id, length)
        for name, members in sorted(groups.items())
    }
    everything = concatenate([part for part in packed.values() if len(part)])
    spans: dict[tuple[str, str], list[int]] = {}
    offset = 0
    for name, part in packed.items():
        spans[name] = list(range(offset, offset + len(part)))
        offset += len(part)

    rng = random.Random(seed)
    common = [i for (group, _), span in spans.items() if group == "common" for i in span]
    only = [
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
    """Concatenate blocks of the same length."""
    return Blocks(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.lengths for part in parts]),
    )


def _draw(rng: random.Random, pool: Sequence[Item], count: int) -> list[Item]:
    """Draw ``count`` members in random order, all about equally often."""
    drawn: list[Item] = []
    while len(drawn) < count and pool:
        drawn += rng.sample(pool, min(len(pool), count - len(drawn)))
    return drawn


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id that begins a text: BOS, or EOS if there is no BOS.

    Raises:
        TrainingError: The tokenizer has neither.
    """
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    raise TrainingError(
        "the tokenizer has neither a BOS nor an EOS token to begin a text with; choose another one"
    )


def byte_lengths(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Number of bytes of each token id, 0 for special tokens."""
    token_bytes = TokenTable.from_tokenizer(tokenizer).token_bytes
    return [0 if text is None else len(text) for text in token_bytes]
