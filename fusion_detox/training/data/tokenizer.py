"""Train a byte-level BPE tokenizer without a normalizer or a prefix space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fusion_detox.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, *, characters: int, context_length: int
) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a calibrator.

    Include toxic text, so that toxic words become whole tokens: parts of a word carry little of
    what the two models learn about the word.

    Args:
        texts: Documents; reading stops after ``characters``.
        vocabulary_size: Number of tokens, including the 256 bytes and the end-of-text token.
        characters: Maximum number of characters to read.
        context_length: The tokenizer's ``model_max_length``.

    Raises:
        TrainingError: The text is too short for that many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def limited() -> Iterator[str]:
        left = characters
        for text in texts:
            if left <= 0:
                return
            left -= len(text)
            yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(limited(), trainer)
    if tokenizer.get_vocab_size() < vocabulary_size:
        raise TrainingError(
            f"the text yields only {tokenizer.get_vocab_size()} tokens, but vocabulary_size is "
            f"{vocabulary_size}: give more text or a smaller vocabulary_size"
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context_length,
    )
