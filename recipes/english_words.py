"""Teach the clean model words that no harmless text needs, and more text that must stay as it is.

    python -m recipes.english_words --data DATA --work WORK --calibrator OLD --out OUT

Continues a calibrator of ``english_context`` with the same graded and harmless text, and adds two
things. A lexicon: words that both judges of ``english_judges`` call toxic in neutral sentences.
Their log-ratio becomes strongly negative in every text, harmless or not, which ``context_limit``
makes use of. In the calibrator's vocabulary, a word may have several tokens. Then its last token
is lowered, in harmless sentences into which the word is inserted. And more harmless text: African
American English and sentences about groups of people (``english_harmless``).
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_detox import Calibrator
from recipes import english_data as english
from recipes.english_context import (
    Graded,
    Models,
    Row,
    encode,
    harmless,
    piece,
    save,
)
from recipes.english_harmless import dialect, groups
from recipes.english_judges import Judges
from recipes.english_lexicon import LARGEST, lexicon, nats

PARTS_AT_MOST = 30
"""A token that is a part of a longer word more often in the harmless texts is not lowered."""
MIX = {
    "general": 0.12, "posts": 0.14, "human": 0.22, "naming": 0.06, "answers": 0.26,
    "dialect": 0.12, "groups": 0.08,
}  # fmt: skip
"""Shares of the harmless text."""
PROVOKING, HARMLESS, INSERTED, STEPS, RATE = 18, 22, 10, 260, 5e-4
FOLLOW_WEIGHT, KL_WEIGHT, SQUARE_WEIGHT, WORD_WEIGHT = 10.0, 14.0, 0.2, 0.03
CEILING = 4.0


class Spelling(NamedTuple):
    """A listed word as it is written in a text: its tokens, and by how many nats to lower it."""

    text: str
    ids: list[int]
    weight: float


def spellings(tokenizer: Any, grades: dict[str, float]) -> list[Spelling]:
    """Each word in lower case, Capitalised and UPPER CASE, after a space and at a text's start."""
    found = []
    for word, grade in grades.items():
        weight = nats(grade)
        for form in dict.fromkeys((word, word.capitalize(), word.upper())):
            for text in (f" {form}", form):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                found.append(Spelling(text, ids, weight))
    return found


def token_weights(
    calibrator: Calibrator, several: Iterable[Spelling], clean: dict[str, list[str]]
) -> Tensor:
    """``(vocab,)`` nats by which each token is lowered in every text.

    These are the words that are one token. A token that is often a part of a longer word in
    harmless text is left out, such as "ass" without a space.
    """
    weights = torch.zeros(calibrator.vocabulary_size)
    for spelling in several:
        if len(spelling.ids) == 1:
            weights[spelling.ids[0]] = max(float(weights[spelling.ids[0]]), spelling.weight)
    parts: Counter[int] = Counter()
    for kind in ("general", "answers", "naming"):
        texts = clean[kind][:12000]
        whole = calibrator.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for text, ids, spans in zip(
            texts, whole["input_ids"], whole["offset_mapping"], strict=True
        ):
            for token, (start, end) in zip(ids, spans, strict=True):
                if weights[token] and (
                    text[end : end + 1].isalpha()
                    or (text[start].isalpha() and text[max(0, start - 1) : start].isalpha())
                ):
                    parts[token] += 1
    for token, count in parts.items():
        if count > PARTS_AT_MOST:
            weights[token] = 0.0
    return weights


def insert(texts: Sequence[str], several: Sequence[Spelling], rng: random.Random) -> list[Any]:
    """Texts with a word of several tokens in each: the text, where the word ends, its spelling."""
    made = []
    for text in texts:
        spelling = rng.choice(several)
        spaces = [at for at, letter in enumerate(text) if letter == " "] or [0]
        at = rng.choice(spaces) if spelling.text.startswith(" ") else 0
        rest = text[at:] if spelling.text.startswith(" ") else f" {text}"
        made.append((text[:at] + spelling.text + rest, at + len(spelling.text), spelling))
    return made


def train(
    calibrator: Calibrator,
    graded: list[Graded],
    clean: dict[str, list[str]],
    several: list[Spelling],
    rng: random.Random,
    steps: int = STEPS,
) -> Any:
    """The clean model after ``steps`` steps."""
    tokenizer, bos = calibrator.tokenizer, calibrator.bos_id
    models = Models.of(calibrator)
    student = models.student
    weights = token_weights(calibrator, several, clean)
    listed = weights.nonzero().flatten()
    print(f"{len(listed)} tokens are lowered everywhere")
    long = [spelling for spelling in several if len(spelling.ids) > 1]
    provoking = [row for row in graded if row.provoking]

    def pieces(count: int) -> list[str]:
        kinds = rng.choices(list(MIX), list(MIX.values()), k=count)
        return [piece(rng.choice(clean[kind]), rng) for kind in kinds]

    def below(ours: Tensor, base: Tensor) -> Tensor:
        """How far the listed tokens are from their log-ratios."""
        return ((ours - base)[:, listed] + weights[listed]).pow(2).mean()

    _start_with(student, weights, encode(tokenizer, bos, rng.sample(graded, 256)), bos)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        warm = min(1.0, (step + 1) / 40)
        decay = 0.04 + 0.48 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * warm * decay
        rows = encode(tokenizer, bos, rng.sample(provoking, PROVOKING))
        ours, base, theirs, _ = models.log_probs(rows, bos, 0.25)
        ratio = (theirs - base).clamp(-LARGEST, CEILING)
        ratio = torch.where(weights > 0, torch.minimum(ratio, -weights), ratio)
        wanted = (base + ratio).log_softmax(-1)
        follow = ((wanted.exp() - ours.exp()) * (wanted - ours)).sum(-1).mean() / 2
        words = below(ours, base)
        texts = pieces(HARMLESS)
        plain = [Graded("", text, [0.0] * len(text.split()), False) for text in texts]
        ours, base, _, written = models.log_probs(encode(tokenizer, bos, plain), bos, 0.34)
        kl = (base.exp() * (base - ours)).sum(-1).mean()
        square = (ours - base).gather(1, written[:, None]).pow(2).mean()
        words = words + below(ours, base)
        last = _last_tokens(tokenizer, bos, insert(pieces(INSERTED), long, rng))
        ours, base, _, written = models.log_probs([row for row, _ in last], bos, 0.0)
        lowered = (ours - base).gather(1, written[:, None]).squeeze(1)
        inserted = (lowered + torch.tensor([weight for _, weight in last])).pow(2).mean()
        loss = FOLLOW_WEIGHT * follow + KL_WEIGHT * kl + SQUARE_WEIGHT * square
        loss = loss + WORD_WEIGHT * (words + inserted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(
                f"step {step}: follow {follow.item():.4f}, KL on harmless text {kl.item():.4f}, "
                f"words {words.item() / 2:.2f}, inserted {inserted.item():.2f}",
                flush=True,
            )
    return student.eval()


@torch.no_grad()
def _start_with(model: Any, weights: Tensor, rows: Sequence[Row], bos: int) -> None:
    """Lowers the tokens in the output layer, along the direction that all hidden states share."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([own + [bos] * (width - len(own)) for own, _ in rows])
    hidden = model.model(ids).last_hidden_state.flatten(0, 1)
    shared = torch.linalg.lstsq(hidden, torch.ones(len(hidden), 1)).solution.squeeze(1)
    model.lm_head.weight -= weights[:, None] * shared[None]


def _last_tokens(tokenizer: Any, bos: int, inserted: list[Any]) -> list[tuple[Row, float]]:
    """Rows in which only the last token of the inserted word is graded, with its weight."""
    whole = tokenizer(
        [text for text, _, _ in inserted], add_special_tokens=False, return_offsets_mapping=True
    )
    found = []
    for (_, end, spelling), ids, offsets in zip(
        inserted, whole["input_ids"], whole["offset_mapping"], strict=True
    ):
        at = next(number for number, (_, until) in enumerate(offsets) if until >= end)
        cut = slice(max(0, at - 30), at + 1)
        grades = [-1.0] * (at - cut.start) + [1.0]
        found.append((([bos, *ids[cut]], [-1.0, *grades]), spelling.weight))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="output of the earlier recipes")
    parser.add_argument("--calibrator", default="english-16k", help="the calibrator to continue")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    rng = random.Random(1)
    torch.manual_seed(1)
    calibrator = Calibrator.from_pretrained(args.calibrator)
    grades = lexicon(args.data, args.work, Judges(args.data, args.work), calibrator.tokenizer)
    graded = [Graded(**row) for row in english.read(args.work / "graded.jsonl")]
    clean = harmless(args.data, args.work)
    clean |= {"dialect": dialect(4000, rng), "groups": groups(3000, rng)}
    several = spellings(calibrator.tokenizer, grades)
    print(f"{len(grades)} words, {len(several)} spellings")
    model = train(calibrator, graded, clean, several, rng, args.steps)
    save(calibrator, model, args.out)


if __name__ == "__main__":
    main()
