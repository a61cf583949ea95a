"""Explains a text token by token: what fusion moved, how strongly, and what the calibrator read."""

from __future__ import annotations

import codecs
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fusion_detox.config import check_number
from fusion_detox.decoding.session import CalibratorSession
from fusion_detox.errors import DataError
from fusion_detox.generation import HELD_BACK_NATS
from fusion_detox.generation.explain import Step, TokenChange, explain_steps
from fusion_detox.generation.sampling import (
    Job,
    Sampling,
    complete_batch,
    continuation_text,
    jobs,
    prompt_ids,
    stop_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.processor import FusionLogitsProcessor

FORMAT = 1
"""Format of an explanation's JSON."""
_CONTEXT_TOKENS = 8

Ids = tuple[int, ...]


class Candidate(NamedTuple):
    """A token that could be written at a step: its text, and its change."""

    text: str
    change: TokenChange


@dataclasses.dataclass(frozen=True)
class ExplainedToken:
    """One token of the text, and what fusion did where it was written.

    Attributes:
        text: What the token adds to the text; for a special token, its name. A character that is
            cut in pieces belongs to the last of them, and the others have no text.
        step: The numbers; see ``explain.Step``.
        before: The most probable tokens without fusion.
        after: The most probable tokens with fusion.
        strength: The strength that was applied: the configured one, or less if ``context_kl`` or
            ``kl_budget`` lowered it.
        divergence: KL(reference ‖ clean) in nats, averaged over the calibrator's last 16 positions
            before this token; ``None`` if the calibrator has no reference.
        open_word: The last word that the calibrator had read. Its next token could still extend it.
        healed: The calibrator's tokens that this token cut anew, before and after; ``None`` if
            none were.
    """

    text: str
    step: Step
    before: tuple[Candidate, ...]
    after: tuple[Candidate, ...]
    strength: float
    divergence: float | None
    open_word: str
    healed: tuple[tuple[str, ...], tuple[str, ...]] | None

    @property
    def held_back(self) -> bool:
        """Whether fusion made this token at least e times less likely."""
        return self.step.held_back(HELD_BACK_NATS)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A text, explained token by token.

    Attributes:
        model: The target's name.
        calibrator: The calibrator's name.
        config: The fusion settings, as JSON values.
        prompt: The prompt as it was given.
        chat: Whether the prompt was put to the model as a request.
        system: The system prompt, if any.
        source: ``"fused"`` if the target wrote the text with fusion, ``"base"`` if without, and
            ``"given"`` if it was given.
        prompt_tokens: How the target cuts the prompt, with its chat template.
        tokens: The explained tokens.
        calibrator_tokens: How the calibrator cuts what it reads of the whole text.
    """

    model: str
    calibrator: str
    config: dict[str, Any]
    prompt: str
    chat: bool
    system: str | None
    source: str
    prompt_tokens: tuple[str, ...]
    tokens: tuple[ExplainedToken, ...]
    calibrator_tokens: tuple[str, ...]

    @property
    def text(self) -> str:
        """The explained text, without the prompt."""
        return "".join(token.text for token in self.tokens)

    @property
    def held_back(self) -> int:
        """How many tokens fusion made at least e times less likely."""
        return sum(token.held_back for token in self.tokens)

    @property
    def mean_kl(self) -> float:
        """KL(fused ‖ target) per token, in nats; 0 without tokens."""
        return sum(token.step.kl for token in self.tokens) / max(len(self.tokens), 1)

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON values; a change by an infinite amount is ``None``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tokens = [
            {
                "text": token.text,
                **_changed(token.step.written),
                "before": [{"text": one.text, **_changed(one.change)} for one in token.before],
                "after": [{"text": one.text, **_changed(one.change)} for one in token.after],
                "kl": token.step.kl,
                "strength": token.strength,
                "divergence": token.divergence,
                "open_word": token.open_word,
                "healed": token.healed,
            }
            for token in self.tokens
        ]
        return {"format": FORMAT, **values, "tokens": tokens}


def explain_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: FusionLogitsProcessor,
    prompt: str,
    text: str | None = None,
    *,
    chat: bool = False,
    system: str | None = None,
    sampling: Sampling | None = None,
    fused: bool = True,
    top: int = 5,
    name: str | None = None,
) -> Explanation:
    """Explain a text that follows a prompt, or generate one and explain it.

    Args:
        model: The target.
        tokenizer: The target's tokenizer.
        processor: The fusion to explain.
        prompt: The prompt. It may be empty if ``text`` is given.
        text: The continuation to explain; by default, one is generated.
        chat: Whether to put the prompt to the model as a request in its chat template.
        system: The system prompt of the chat.
        sampling: How to generate; by default 40 tokens with top-p 0.9.
        fused: Whether to generate with fusion. If not, the explanation shows what fusion would have
            held back.
        top: Number of alternatives per step, at least 1.
        name: The target's name; by default, what its configuration says.

    Raises:
        ConfigError: A setting is out of range, or the tokenizer has no chat template for a chat.
        DataError: There is nothing to explain: both texts are empty, or the model wrote nothing.
            Or the text does not fit into the model's context.
        ModelError: The model's scores are not finite, or memory runs out.
    """
    check_number("top", top, 1, whole=True)
    sampling = sampling or Sampling()
    if text is None:
        (job,) = jobs([prompt], chat=chat, system=system)
        before = prompt_ids(model, tokenizer, job, sampling.max_new_tokens)
        used = processor if fused else None
        (done,) = complete_batch(model, tokenizer, [job], [before], sampling, used)
        ids, source = list(done.token_ids), "fused" if fused else "base"
    else:
        before, ids = _given_ids(model, tokenizer, Job(0, 0, prompt, chat, system), text)
        source = "given"
    if not ids:
        raise DataError(
            "there is no token to explain: the text is empty"
            if source == "given"
            else "there is no token to explain, because the model ended the text at once: try "
            "another prompt or seed"
        )
    return Explanation(
        model=name or str(getattr(model.config, "name_or_path", "") or "unnamed"),
        calibrator=processor.calibrator.name or "unnamed",
        config=processor.config.to_dict(),
        prompt=prompt,
        chat=chat,
        system=system,
        source=source,
        prompt_tokens=tuple(_pieces(tokenizer, before)),
        tokens=tuple(_explained(model, tokenizer, processor, before, ids, top)),
        calibrator_tokens=_spelled(processor.calibrator, processor.reading([*before, *ids]).path),
    )


def _given_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job, text: str
) -> tuple[list[int], list[int]]:
    """The tokens before a given text, and its own; a token across the border counts as its own."""
    before = prompt_ids(model, tokenizer, job, 0)
    if job.chat:
        # The template of a chat ends with a special token or a line break.
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        whole = list(tokenizer(job.prompt + text)["input_ids"])
        while len(whole) > 1 and whole[-1] in stop_ids(model):
            whole.pop()
        pairs = zip(before, whole, strict=False)
        common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(whole)))
        before, ids = before[:common] or before[:1], whole[common:]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and len(before) + len(ids) > limit:
        raise DataError(
            f"the text has {len(before) + len(ids)} tokens with its prompt, but the model has "
            f"{limit} positions: shorten it"
        )
    return before, ids


def _explained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: FusionLogitsProcessor,
    before: Sequence[int],
    ids: Sequence[int],
    top: int,
) -> list[ExplainedToken]:
    row = torch.tensor([[*before, *ids]], device=model.device)
    start = len(before)
    with torch.no_grad():
        logits = model(input_ids=row).logits[0, start - 1 : -1].float()
        made = [
            processor.with_strength(row[:, : start + n], logits[n : n + 1]) for n in range(len(ids))
        ]
    steps = explain_steps(logits, torch.cat([fused for fused, _ in made]), ids, top=top)
    texts = [(*before, *ids[:n]) for n in range(len(ids) + 1)]
    readings = [processor.reading(text) for text in texts]
    divergences = recent_divergence(processor.calibrator, [one.path for one in readings[:-1]])
    pieces = _pieces(tokenizer, texts[-1])[start:]
    found = []
    for n, step in enumerate(steps):
        now, then = readings[n], readings[n + 1]

        def candidates(
            changes: Sequence[TokenChange], text: Ids = texts[n]
        ) -> tuple[Candidate, ...]:
            return tuple(Candidate(_piece(tokenizer, text, one.token_id), one) for one in changes)

        found.append(
            ExplainedToken(
                text=pieces[n],
                step=step,
                before=candidates(step.before),
                after=candidates(step.after),
                strength=made[n][1].item(),
                divergence=divergences[n],
                open_word=(b"".join(now.word) + now.pending).decode("utf-8", "replace"),
                healed=_healed(processor.calibrator, now.path, then.path),
            )
        )
    return found


def recent_divergence(calibrator: Calibrator, paths: Sequence[Ids]) -> list[float | None]:
    """KL(reference ‖ clean) of the next token, averaged over the last 16 positions of each text.

    ``context_kl`` adapts the strength to this number.

    Args:
        calibrator: The calibrator.
        paths: Calibrator ids of each text, without BOS.

    Returns:
        One value per text, in nats; ``None`` for all if the calibrator has no reference.
    """
    if calibrator.reference is None:
        return [None] * len(paths)
    session = CalibratorSession(calibrator, device=calibrator.device)
    return list(session.recent_divergence(paths))


def _healed(
    calibrator: Calibrator, now: Ids, then: Ids
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The calibrator's tokens from where two readings differ, if the earlier one was changed."""
    pairs = zip(now, then, strict=False)
    common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(now), len(then)))
    # A new request of a chat starts a new text.
    if common == len(now) or common == 0:
        return None
    return _spelled(calibrator, now[common:]), _spelled(calibrator, then[common:])


def _spelled(calibrator: Calibrator, path: Ids) -> tuple[str, ...]:
    """The text of each token; a character that is cut in pieces belongs to the last of them."""
    token_bytes = calibrator.tokens.token_bytes
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = [decoder.decode(token_bytes[id] or b"") for id in path]
    if rest := decoder.decode(b"", final=True):
        found[-1] += rest
    return tuple(found)


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to a text; see :func:`_spelled`. Special tokens have their names."""
    added: Any = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
    found, end = [], 0
    for n, id in enumerate(ids, 1):
        text = continuation_text(tokenizer, (), ids[:n])
        # An unfinished character decodes to U+FFFD until its last byte arrives.
        whole = text if n == len(ids) else text.rstrip("\ufffd")
        found.append(str(tokenizer.convert_ids_to_tokens(id)) if id in special else whole[end:])
        end = max(end, len(whole))
    return found


def _piece(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], id: int) -> str:
    """What one token would add to a text; for a token without text, its name."""
    text = continuation_text(tokenizer, before[-_CONTEXT_TOKENS:], [id])
    return text or str(tokenizer.convert_ids_to_tokens(id))


def _changed(change: TokenChange) -> dict[str, Any]:
    moved = change.change
    return {
        "id": change.token_id,
        "probability": math.exp(change.target_log_prob),
        "fused_probability": math.exp(change.fused_log_prob),
        "change": moved if math.isfinite(moved) else None,
    }
