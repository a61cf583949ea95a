"""Sample completions of many prompts in batches, with or without fusion.

Each completion is reproducible on its own: the noise of a token depends only on the seed, the index
of the prompt, the number of the sample, the step, and the token's id. A completion is therefore the
same in any batch and after any interruption, up to rounding in the model. A fused completion uses
the same noise as its unfused counterpart, so the two are equal until fusion changes a token.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusion_detox.config import check_number
from fusion_detox.errors import ConfigError, DataError, ModelError
from fusion_detox.generation.chat import chat_prompt, check_system, end_of_turn_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Attributes:
        max_new_tokens: Maximum length of a completion in tokens, at least 1.
        temperature: Divisor of the fused log-probs, above 0 (from 0.0001 to 10000).
        top_p: Sample from the smallest set of tokens with this total probability, above 0 and at
            most 1.
        top_k: Sample from this many of the most probable tokens; 0 means all.
        greedy: Always choose the most probable token.
        samples: Completions per prompt, at least 1.
        seed: Seed of the noise, at least 0.
    """

    max_new_tokens: int = 40
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 0
    greedy: bool = False
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("top_k", 0), ("samples", 1), ("seed", 0)):
            check_number(name, getattr(self, name), low, whole=True)
        note = "; to choose the most probable token, set greedy"
        check_number("temperature", self.temperature, 0, above=True, note=note)
        check_number("temperature", self.temperature, 1e-4, 1e4, note=note)
        check_number("top_p", self.top_p, 0, 1, above=True)
        if self.greedy and self.samples > 1:
            raise ConfigError(
                f"{self.samples} greedy samples of a prompt would be identical: set samples to 1, "
                "or greedy to False"
            )


@dataclasses.dataclass(frozen=True)
class Job:
    """One completion to generate.

    Attributes:
        index: The index of the prompt.
        sample: The number of the sample.
        prompt: A text to continue, or with ``chat`` a request.
        chat: Whether the prompt is put to the model in its chat template.
        system: The system prompt of the chat; by default, what the template adds, if anything.
    """

    index: int
    sample: int
    prompt: str
    chat: bool = False
    system: str | None = None


class Completion(NamedTuple):
    """A generated continuation, without the prompt and special tokens.

    ``finished`` is true if the model ended the text, and false at ``max_new_tokens``.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool


class Row(NamedTuple):
    """A finished job; ``base`` is the unfused completion if one was requested."""

    job: Job
    completion: Completion
    base: Completion | None


def jobs(
    prompts: Sequence[str], samples: int = 1, *, chat: bool = False, system: str | None = None
) -> list[Job]:
    """List the jobs for some prompts, in the order of their output.

    Args:
        prompts: The prompts.
        samples: Completions per prompt.
        chat: See ``Job``.
        system: See ``Job``.

    Raises:
        ConfigError: There is a system prompt without chat.
        DataError: The list is empty, or a prompt is empty or holds lone surrogates.
    """
    check_system(chat, system)
    if not prompts:
        raise DataError("the list of prompts is empty: give at least one prompt")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise DataError(f"prompt {index} is empty: remove it or give it some text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"prompt {index} is not valid Unicode text (character {error.start} is "
                f"{prompt[error.start]!r}): encode it as UTF-8"
            ) from error
    return [
        Job(i, k, prompt, chat, system) for i, prompt in enumerate(prompts) for k in range(samples)
    ]


def generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pending: Sequence[Job],
    sampling: Sampling,
    *,
    processor: LogitsProcessor | None = None,
    with_base: bool = False,
    batch_size: int = 8,
) -> Iterator[Row]:
    """Generate completions batch by batch, in the order of ``pending``.

    Args:
        model: The target, a causal language model.
        tokenizer: The target's tokenizer.
        pending: The jobs that are not done yet; see :func:`jobs`.
        sampling: Sampling settings.
        processor: Applied to the scores before temperature, top-k and top-p; usually a
            ``FusionLogitsProcessor`` built with ``pad_token_id=pad_token_id(model, tokenizer)``.
        with_base: Whether to generate each completion a second time without ``processor``.
        batch_size: Completions per batch.

    Raises:
        ConfigError: ``batch_size`` is below 1, the tokenizer has no chat template for a chat, or a
            batch mixes chats and plain prompts.
        DataError: A prompt and its completion do not fit into the model's context.
        ModelError: The model's scores are not finite, or memory runs out.
    """
    check_number("batch_size", batch_size, 1, whole=True)
    encoded = [prompt_ids(model, tokenizer, job, sampling.max_new_tokens) for job in pending]
    for start in range(0, len(pending), batch_size):
        batch, ids = pending[start : start + batch_size], encoded[start : start + batch_size]
        fused = complete_batch(model, tokenizer, batch, ids, sampling, processor)
        base: Sequence[Completion | None] = [None] * len(batch)
        if with_base:
            base = complete_batch(model, tokenizer, batch, ids, sampling, None)
        yield from map(Row, batch, fused, base)


def complete_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Job],
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
    processor: LogitsProcessor | None,
) -> list[Completion]:
    """Generate the completions of one batch; ``ids`` are the tokens of each job's prompt.

    Raises:
        ConfigError: The batch mixes chats and plain prompts.
        ModelError: The model's scores are not finite, or memory runs out.
    """
    pad = pad_token_id(model, tokenizer)
    width = max(map(len, ids))
    input_ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    chats = {job.chat for job in batch}
    if len(chats) > 1:
        raise ConfigError(
            "a batch mixes chats and plain prompts, which end differently: generate them in two "
            "calls"
        )
    stops = completion_ends(model, tokenizer, chat=chats == {True})
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        eos_token_id=sorted(stops) or None,
    )
    processors = LogitsProcessorList([] if processor is None else [processor])
    if not sampling.greedy:
        processors.extend(_draw(sampling, batch, width))
    processors.insert(0, _FiniteCheck())
    try:
        with torch.no_grad():
            output: Any = model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                logits_processor=processors,
            )
    except RuntimeError as error:
        out_of_memory = isinstance(error, torch.cuda.OutOfMemoryError)
        if not out_of_memory and "allocate memory" not in str(error):
            raise
        raise ModelError(
            f"device {model.device} ran out of memory with a batch of {len(batch)} texts of up to "
            f"{width + sampling.max_new_tokens} tokens: use a smaller batch size"
        ) from error
    completions = []
    for prompt, row in zip(ids, output[:, width:].tolist(), strict=True):
        end = next((k for k, token in enumerate(row) if token in stops), len(row))
        text = continuation_text(tokenizer, prompt, row[:end])
        completions.append(Completion(text, tuple(row[:end]), end < len(row)))
    return completions


def prompt_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job, new_tokens: int
) -> list[int]:
    """Tokenize a prompt as the start of a text, or a request in the model's chat template.

    Raises:
        ConfigError: The job is a chat and the tokenizer has no chat template, or the template
            refuses it.
        DataError: The prompt and ``new_tokens`` do not fit into the model's context.
    """
    if job.chat:
        text = chat_prompt(tokenizer, job.prompt, job.system)
        ids: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = list(tokenizer(job.prompt)["input_ids"])
        stops = stop_ids(model)
        # T5-like tokenizers append an end-of-text token, after which a model cannot continue.
        while len(ids) > 1 and ids[-1] in stops:
            ids.pop()
    ids = ids or [pad_token_id(model, tokenizer)]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and len(ids) + new_tokens > limit:
        raise DataError(
            f"prompt {job.index} has {len(ids)} tokens, and with {new_tokens} new ones it exceeds "
            f"the {limit} positions of the model: shorten the prompt, or reduce max_new_tokens"
        )
    return ids


def continuation_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], new: Sequence[int]
) -> str:
    """Decode ``new`` after a prompt, keeping the leading space that SentencePiece would drop."""

    def decode(ids: Sequence[int]) -> str:
        text: Any = tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    before, whole = decode(prompt), decode([*prompt, *new])
    return whole[len(before) :] if whole.startswith(before) else decode(new)


def stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids that end a completion, from the model's generation settings."""
    eos: Any = model.generation_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, Collection) else [eos])


def completion_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> frozenset[int]:
    """Return the ids that end a completion; in a chat, also the one that ends a turn."""
    turn = end_of_turn_id(tokenizer) if chat else None
    return stop_ids(model) | (frozenset() if turn is None else {turn})


def pad_token_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id for left padding: the tokenizer's pad or EOS id, the model's EOS id, or 0."""
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(stop_ids(model)), 0]
    return int(next(token for token in known if token is not None))


def token_chooser(sampling: Sampling, job: Job, width: int) -> Callable[[Tensor, Tensor], int]:
    """Return how :func:`complete_batch` chooses the next token of a single row.

    Args:
        sampling: Sampling settings.
        job: The row's job, whose index and sample determine the noise.
        width: Number of tokens of its prompt.

    Returns:
        A function of ``(1, length)`` ids and ``(1, vocab)`` scores, fused or not. It raises
        ``ModelError`` if the scores are not finite.
    """
    drawn = [] if sampling.greedy else _draw(sampling, [job], width)
    chain: Any = LogitsProcessorList([_FiniteCheck(), *drawn])
    return lambda ids, scores: int(chain(ids, scores).argmax())


def _draw(sampling: Sampling, batch: Sequence[Job], width: int) -> list[LogitsProcessor]:
    chain: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    return [*chain, _KeyedDraw([_key(sampling.seed, job) for job in batch], width)]


def _key(seed: int, job: Job) -> int:
    name = f"{seed}:{job.index}:{job.sample}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big", signed=True)


class _FiniteCheck(LogitsProcessor):
    """Raises an error if a row has no finite maximum; argmax would return token 0 for it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.amax(dim=-1)).all():
            raise ModelError(
                f"the model's scores after {input_ids.shape[1]} tokens are not finite: its weights "
                "are damaged, or its dtype is too narrow (try float32 or bfloat16)"
            )
        return scores


class _KeyedDraw(LogitsProcessor):
    """Samples a token by the Gumbel-max trick, with hashed noise, and forbids all others.

    ``argmax(scores + Gumbel noise)`` is a sample of ``softmax(scores)`` (Gumbel 1954; Maddison et
    al. 2014). This processor runs last; ``generate`` then selects its token greedily.
    """

    def __init__(self, keys: Sequence[int], width: int) -> None:
        self._keys = torch.tensor(keys, dtype=torch.int64)
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # MPS has no float64.
        work = scores.cpu() if scores.device.type == "mps" else scores
        rows, ids = torch.isfinite(work).nonzero(as_tuple=True)
        step = input_ids.shape[1] - self._width
        noise = _hashed_gumbel(self._keys.to(work.device)[rows], step, ids)
        noisy = torch.full(work.shape, -torch.inf, dtype=torch.float64, device=work.device)
        noisy[rows, ids] = work[rows, ids].double() + noise
        drawn = noisy.argmax(dim=-1, keepdim=True).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def _hashed_gumbel(keys: Tensor, step: int, ids: Tensor) -> Tensor:
    """Standard Gumbel noise in float64, from a splitmix64 hash (Steele et al. 2014)."""
    state = _splitmix64(_splitmix64(keys + step) + ids)
    uniform = (_shift(state, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _splitmix64(state: Tensor) -> Tensor:
    # The published constants as signed numbers; int64 products wrap around as intended.
    state = state + -0x61C8864680B583EB
    state = (state ^ _shift(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shift(state, 27)) * -0x6B2FB644ECCEEE15
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical right shift, which int64 tensors lack."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
