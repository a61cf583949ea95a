"""Teach the clean model where to change nothing, and to hold back toxic words more sharply.

    python -m recipes.english_data --data DATA --out WORK
    python -m recipes.english_continuations --data DATA --work WORK
    python -m recipes.english_context --data DATA --work WORK --calibrator OLD --out OUT

The divergence of the two models is what switches fusion on (``context_threshold``). In OLD, text by
chat models, tweets and sentences about groups of people have a divergence like that of provoking
text. Here, the clean model learns two things at once. After provoking beginnings, it predicts what
it predicted before, with the log-ratio to the reference times 1.15 and toxic words lowered further.
On harmless text of every kind, assistants' answers among them, it predicts what the reference does.

The provoking text is what GPT-3.5, GPT-4 and SmolLM2 wrote after training prompts, and toxic text
with human labels. Refusals are left out. The judges of ``english_judges`` grade every third word by
the ten words that begin there; a token whose mean grade is high, and which both judges call toxic
on its own, is lowered by up to 5 nats. The clean model gets an output layer of its own.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import train_scorers
from fusion_detox import Calibrator
from recipes import english_data as english
from recipes.english_continuations import part
from recipes.english_judges import NETWORK_SHARE, Judges

WINDOW, STRIDE, LENGTH = 10, 3, 40
WORDS = re.compile(r"\S+")
REFUSAL = re.compile(
    r"(?i)\b(as an ai|language model|i'?m sorry|i am sorry|i apologi[sz]e|inappropriate|openai"
    r"|(cannot|can't) (generate|fulfill|complete|provide|continue)|offensive language"
    r"|not appropriate|derogatory|respectful)\b"
)
"""Refusals and role-play are no continuations; the clean model must not learn to refuse."""
MIX = {"general": 0.14, "posts": 0.16, "human": 0.28, "naming": 0.1, "answers": 0.32}
"""Shares of the harmless text."""
PROVOKING, HARMLESS, STEPS, RATE = 20, 22, 200, 5e-4
FOLLOW_WEIGHT, KL_WEIGHT, SQUARE_WEIGHT = 10.0, 12.0, 0.2
SHARPEN, LARGEST, WORD_SHARE = 1.15, 4.0, 0.7
PRIOR, PRIOR_TOKENS, TOXIC_FROM = 0.3, 6, 0.55
NOT_TOXIC = re.compile(
    r"(?i)(jews?|whites?|blacks?|asians?|whit|deport|aids|assass|switches|fat|silly|pig|rape|pus"
    r"|nig|clown|garbage|hell|fool|whitegenocide)"
)
"""Tokens that labels and judges call toxic, but which are names of groups, have harmless uses, or
begin harmless words."""
Row = tuple[list[int], list[float]]
"""Token ids, and the grade of each; -1 for tokens that do not count."""


class Graded(NamedTuple):
    """A text after a prompt, the grade of each of its words, and whether it is provoking."""

    prompt: str
    text: str
    grades: list[float]
    provoking: bool


def texts(data: Path, work: Path, rng: random.Random) -> list[tuple[str, str, int | None]]:
    """Prompt, text and human label, if any."""
    by_prompt: dict[str, list[str]] = {}
    for row in english.rows(data / "llm_continuations.jsonl.gz"):
        text = row["continuation"]
        if part(row["prompt"]) == "training" and not REFUSAL.search(text):
            by_prompt.setdefault(row["prompt"], []).append(text)
    found: list[tuple[str, str, int | None]] = []
    for prompt, several in by_prompt.items():
        distinct = list(dict.fromkeys(several))
        rng.shuffle(distinct)
        for text in distinct[:18]:
            spaced = f" {text}" if text[:1].isalnum() else text
            found.append((prompt, " ".join(spaced.split(" ")[:26]), None))
    for row in english.read(work / "target_continuations.jsonl"):
        for text in dict.fromkeys(row["continuations"]):
            if text.strip() and not REFUSAL.search(text):
                found.append((row["prompt"], text, None))
    human = labelled(data)
    rng.shuffle(human)
    for toxic, most in ((True, 5000), (False, 3500)):
        own = [row["text"] for row in human if row["toxic"] is toxic][:most]
        found += [("", " ".join(text.split(" ")[:36]), int(toxic)) for text in own]
    posts = [
        row["text"]
        for row in english.read(work / "general.jsonl")
        if row["source"] == "web_posts" and row["toxic"] and row["score"] > 0.8
    ]
    rng.shuffle(posts)
    found += [("", piece, None) for text in posts[:1200] for piece in english.chunks(text)[:2]]
    rng.shuffle(found)
    return found


def labelled(data: Path) -> list[dict[str, Any]]:
    """The half of the human labels that no scorer has seen, without the held-out texts."""
    return [
        row
        for row in english.labelled(data)
        if english.bucket("half" + row["text"]) < 50 and english.bucket(row["text"]) >= 4
    ]


def grade(items: Sequence[tuple[str, str, int | None]], judges: Judges) -> list[Graded]:
    """Grades of all words: every third word's window is judged, the others are interpolated.

    Human-labelled text and posts are judged by the TF-IDF classifier alone, which is fast; half of
    a human-labelled text's grade is its label, and harmless text gets half of the judged grade.
    """
    graded = []
    for prompt, text, label in items:
        spans = [match.span() for match in WORDS.finditer(text)]
        if not spans:
            continue
        at = sorted({*range(0, len(spans), STRIDE), len(spans) - 1})
        windows = [text[spans[i][0] : spans[min(i + WINDOW, len(spans)) - 1][1]] for i in at]
        judged = judges.filter.score(windows)
        if prompt:
            with torch.inference_mode():
                found = torch.sigmoid(judges.network(judges.embed(windows)).squeeze(1))
            judged = NETWORK_SHARE * found.numpy() + (1 - NETWORK_SHARE) * judged
        grades = np.interp(range(len(spans)), at, judged)
        if label is not None:
            grades = 0.5 * grades + 0.5 * label
        values = [round(float(value), 3) for value in grades]
        graded.append(Graded(prompt, text, values, label != 0))
    return graded


def encode(tokenizer: Any, bos: int, rows: Sequence[Graded]) -> list[Row]:
    """Tokens with the grade of the word that their last character is in."""
    whole = tokenizer(
        [row.prompt + row.text for row in rows],
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    encoded = []
    for row, ids, offsets in zip(rows, whole["input_ids"], whole["offset_mapping"], strict=True):
        starts = [match.start() for match in WORDS.finditer(row.text)]
        own: list[float] = []
        for _, end in offsets:
            place = end - 1 - len(row.prompt)
            word = max(int(np.searchsorted(starts, place, side="right")) - 1, 0)
            own.append(-1.0 if place < 0 else row.grades[word])
        first = next((at for at, value in enumerate(own) if value >= 0), None)
        if first is not None:
            cut = slice(max(0, first - LENGTH * 2 // 5), None)
            encoded.append(([bos, *ids[cut]][:LENGTH], [-1.0, *own[cut]][:LENGTH]))
    return encoded


def harmless(data: Path, work: Path) -> dict[str, list[str]]:
    """Text that must stay as it is: each kind of ``MIX``."""
    clean = english.read(work / "clean.jsonl")
    answers = english.read(work / "target_answers.jsonl")
    return {
        "general": [row["text"] for row in clean if row["source"] == "general"],
        "posts": [row["text"] for row in clean if row["source"] == "web_posts"],
        # Much of it is in African American English or names groups of people.
        "human": [row["text"] for row in labelled(data) if not row["toxic"]],
        "naming": train_scorers.naming(),
        "answers": [f"{row['prompt']}\n{text}" for row in answers for text in row["continuations"]],
    }


def word_weights(
    calibrator: Calibrator, graded: list[Graded], clean: dict[str, list[str]], judges: Judges
) -> Tensor:
    """``(vocab,)`` nats by which toxic words are lowered: 0 for all but about a hundred tokens.

    A token's toxicity is its mean grade in the graded text, with the harmless text as examples of
    grade 0 and some examples of grade ``PRIOR``.
    """
    size, tokenizer, bos = calibrator.vocabulary_size, calibrator.tokenizer, calibrator.bos_id
    counts, sums = (
        torch.full((size,), float(PRIOR_TOKENS)),
        torch.full((size,), PRIOR * PRIOR_TOKENS),
    )
    for ids, grades in encode(tokenizer, bos, graded):
        for token, value in zip(ids, grades, strict=True):
            if value >= 0:
                counts[token] += 1
                sums[token] += value
    for several in clean.values():
        for ids in tokenizer([text[:240] for text in several[:2000]])["input_ids"]:
            counts += torch.bincount(torch.tensor(ids), minlength=size)[:size]
    toxicity = sums / counts
    excess = torch.logit(toxicity.clamp(0.001, 0.97)) - math.log(TOXIC_FROM / (1 - TOXIC_FROM))
    weights = torch.zeros(size)
    for token in ((excess > 0.15) & (toxicity > 0.4)).nonzero().flatten().tolist():
        word = tokenizer.decode([token]).strip() or "."
        with torch.inference_mode():
            network = float(torch.sigmoid(judges.network(judges.embed([word]))))
        if (network + float(judges.filter.score([word])[0])) / 2 > 0.5 and not NOT_TOXIC.fullmatch(
            word
        ):
            weights[token] = -2 * float(excess[token]) - 0.5
    return weights


class Models(NamedTuple):
    """The clean model that is trained, and what it is compared with."""

    student: Any
    reference: Any
    teacher: Any

    @classmethod
    def of(cls, calibrator: Calibrator) -> Models:
        """The student starts as the calibrator's clean model, with an output layer of its own."""
        assert calibrator.reference is not None
        reference = calibrator.reference.float().eval().requires_grad_(False)
        teacher = calibrator.clean.float().eval().requires_grad_(False)
        student = copy.deepcopy(teacher).train().requires_grad_(True)
        if student.config.tie_word_embeddings:
            student.config.tie_word_embeddings = False
            student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach().clone())
        return cls(student, reference, teacher)

    def log_probs(
        self, rows: Sequence[Row], bos: int, keep: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs of student, reference and teacher at the tokens kept, and the tokens.

        All tokens graded above .35 are kept; of the others, a fraction of ``keep``, or as many as
        of the former.
        """
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), bos)
        grades = torch.full((len(rows), width), -1.0)
        for number, (own, values) in enumerate(rows):
            ids[number, : len(own)] = torch.tensor(own)
            grades[number, : len(own)] = torch.tensor(values)
        counted, high = grades[:, 1:] >= 0, grades[:, 1:] > 0.35
        share = max(keep, min(1.0, float(high.sum()) / max(1.0, float((counted & ~high).sum()))))
        kept = high | (counted & (torch.rand(counted.shape) < share))

        def of(model: Any) -> Tensor:
            hidden = model.model(ids).last_hidden_state[:, :-1][kept]
            found: Tensor = model.lm_head(hidden).log_softmax(-1)
            return found

        with torch.no_grad():
            fixed = of(self.reference), of(self.teacher)
        return of(self.student), *fixed, ids[:, 1:][kept]


def train(
    calibrator: Calibrator,
    graded: list[Graded],
    clean: dict[str, list[str]],
    weights: Tensor,
    rng: random.Random,
) -> Any:
    """The clean model after ``STEPS`` steps."""
    tokenizer, bos = calibrator.tokenizer, calibrator.bos_id
    models = Models.of(calibrator)
    student = models.student
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    provoking = [row for row in graded if row.provoking]
    for step in range(STEPS):
        warm = min(1.0, (step + 1) / 40)
        decay = 0.05 + 0.475 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = RATE * warm * decay
        rows = encode(tokenizer, bos, rng.sample(provoking, PROVOKING))
        ours, base, theirs, _ = models.log_probs(rows, bos, 0.25)
        ratio = SHARPEN * (theirs - base).clamp(-LARGEST, LARGEST)
        wanted = (base + ratio + WORD_SHARE * weights).log_softmax(-1)
        follow = ((wanted.exp() - ours.exp()) * (wanted - ours)).sum(-1).mean() / 2
        kinds = rng.choices(list(MIX), list(MIX.values()), k=HARMLESS)
        pieces = [piece(rng.choice(clean[kind]), rng) for kind in kinds]
        plain = [Graded("", text, [0.0] * len(WORDS.findall(text)), False) for text in pieces]
        ours, base, _, written = models.log_probs(encode(tokenizer, bos, plain), bos, 0.34)
        kl = (base.exp() * (base - ours)).sum(-1).mean()
        square = (ours - base).gather(1, written[:, None]).pow(2).mean()
        loss = FOLLOW_WEIGHT * follow + KL_WEIGHT * kl + SQUARE_WEIGHT * square
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}, KL on harmless text {kl.item():.4f}")
    return student.eval()


def piece(text: str, rng: random.Random) -> str:
    if len(text) <= 300:
        return text
    start = text.find(" ", rng.randrange(len(text) - 250)) + 1
    return text[start : start + 320]


def save(calibrator: Calibrator, clean: Any, folder: Path) -> None:
    """Write a calibrator with another clean model."""
    made = Calibrator(
        clean,
        calibrator.reference,
        calibrator.tokenizer,
        config=calibrator.config,
        context_length=calibrator.context_length,
        record=dict(calibrator.record),
        name=calibrator.name,
        probes=calibrator.probes,
    )
    made.save_pretrained(folder, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="output of the earlier recipes")
    parser.add_argument("--calibrator", default="english-16k", help="the calibrator to continue")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rng = random.Random(1)
    torch.manual_seed(1)
    judges = Judges(args.data, args.work)
    kept = args.work / "graded.jsonl"
    if not kept.exists():  # takes a quarter of an hour on two cores
        items = texts(args.data, args.work, random.Random(3))
        english.write(kept, (row._asdict() for row in grade(items, judges)))
    graded = [Graded(**row) for row in english.read(kept)]
    calibrator = Calibrator.from_pretrained(args.calibrator)
    clean = harmless(args.data, args.work)
    weights = word_weights(calibrator, graded, clean, judges)
    model = train(calibrator, graded, clean, weights, rng)
    save(calibrator, model, args.out)


if __name__ == "__main__":
    main()
