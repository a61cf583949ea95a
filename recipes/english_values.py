"""Teach the clean model, token by token, what a word leads to; then where to change nothing.

    python -m recipes.english_values --data DATA --work WORK --calibrator english-16k --out OUT

The text is what GPT-3.5, GPT-4 and SmolLM2 wrote after training prompts, and toxic and harmless
text with human labels. Every third word is graded: how toxic are the ten words that begin there?
The judges are those of ``english_judges``. If ``d`` is the log-ratio of the clean model to the
frozen reference at the token that was written, ``sigmoid(a - d)`` should be the grade. ``a`` is a
small network on the last hidden states, which is then discarded: it knows how toxic the context is,
so ``d`` learns what the token itself changes (after Rectification, arXiv 2302.14003, and FUDGE, arXiv
2104.05218). On harmless text of every kind, assistants' answers among them, a KL term keeps
the two models together: their divergence is what switches fusion on (``context_threshold``).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
GRADED, HARMLESS, STEPS, RATE, KL_WEIGHT, SQUARE_WEIGHT = 24, 26, 260, 4e-4, 12.0, 0.3
Row = tuple[list[int], list[float]]
"""Token ids, and the grade of each; -1 for tokens that do not count."""


class Graded(NamedTuple):
    """A text after a prompt, and the grade of each of its words."""

    prompt: str
    text: str
    grades: list[float]


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
        graded.append(Graded(prompt, text, [round(float(value), 3) for value in grades]))
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


class Student:
    """The clean model in training, the frozen reference, and the network that knows the context."""

    def __init__(self, calibrator: Calibrator) -> None:
        assert calibrator.reference is not None
        self.reference = calibrator.reference.float().eval().requires_grad_(False)
        self.clean = copy.deepcopy(calibrator.clean.float()).train().requires_grad_(True)
        width = self.clean.config.hidden_size
        self.context = nn.Sequential(nn.Linear(2 * width, 128), nn.GELU(), nn.Linear(128, 1))
        nn.init.constant_(self.context[-1].bias, -2.0)

    def __call__(self, rows: Sequence[Row], keep: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the grades, grades, and mean KL(reference ‖ clean), at the tokens kept.

        All tokens graded above .35 are kept; of the others, a fraction of ``keep`` or as many as
        of the former.
        """
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        grades = torch.full((len(rows), width), -1.0)
        for number, (own, values) in enumerate(rows):
            ids[number, : len(own)] = torch.tensor(own)
            grades[number, : len(own)] = torch.tensor(values)
        counted, high = grades[:, 1:] >= 0, grades[:, 1:] > 0.35
        share = max(keep, min(1.0, float(high.sum()) / max(1.0, float((counted & ~high).sum()))))
        kept = high | (counted & (torch.rand(counted.shape) < share))
        ours = self.clean.model(ids).last_hidden_state[:, :-1][kept]
        with torch.no_grad():
            theirs = self.reference.model(ids).last_hidden_state[:, :-1][kept]
            base = self.reference.lm_head(theirs).log_softmax(-1)
        log_probs = self.clean.lm_head(ours).log_softmax(-1)
        written = ids[:, 1:][kept]
        self.ratio = (log_probs - base).gather(1, written[:, None]).squeeze(1)
        context = self.context(torch.cat([ours, theirs], -1)).squeeze(1)
        kl = (base.exp() * (base - log_probs)).sum(-1).mean()
        return context - self.ratio, grades[:, 1:][kept], kl


def train(
    calibrator: Calibrator, graded: list[Graded], clean: dict[str, list[str]], rng: random.Random
) -> Any:
    """The clean model after ``STEPS`` steps."""
    tokenizer, bos = calibrator.tokenizer, calibrator.bos_id
    student = Student(calibrator)
    optimizer = torch.optim.AdamW(
        [
            {"params": student.clean.parameters(), "weight_decay": 0.01, "peak": RATE},
            {"params": student.context.parameters(), "peak": 1e-3},
        ],
        betas=(0.9, 0.98),
    )

    def piece(text: str) -> str:
        if len(text) <= 300:
            return text
        start = text.find(" ", rng.randrange(len(text) - 250)) + 1
        return text[start : start + 320]

    for step in range(STEPS):
        warm = min(1.0, (step + 1) / 40)
        decay = 0.05 + 0.475 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warm * decay
        logits, grades, _ = student(encode(tokenizer, bos, rng.sample(graded, GRADED)), 0.25)
        loss = F.binary_cross_entropy_with_logits(logits, grades)
        kinds = rng.choices(list(MIX), list(MIX.values()), k=HARMLESS)
        pieces = [piece(rng.choice(clean[kind])) for kind in kinds]
        rows = [Graded("", text, [0.0] * len(WORDS.findall(text))) for text in pieces]
        logits, grades, kl = student(encode(tokenizer, bos, rows), 0.34)
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(logits, grades)
        loss = loss + KL_WEIGHT * kl + SQUARE_WEIGHT * student.ratio.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.clean.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {float(loss):.3f}, KL on harmless text {float(kl):.4f}")
    return student.clean.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="output of the earlier recipes")
    parser.add_argument("--calibrator", default="english-16k", help="the calibrator to continue")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rng = random.Random(1)
    torch.manual_seed(1)
    kept = args.work / "graded.jsonl"
    if not kept.exists():  # the judges take half an hour on two cores
        items = texts(args.data, args.work, random.Random(3))
        found = grade(items, Judges(args.data, args.work))
        english.write(kept, (row._asdict() for row in found))
    graded = [Graded(**row) for row in map(json.loads, kept.open(encoding="utf-8"))]
    calibrator = Calibrator.from_pretrained(args.calibrator)
    model = train(calibrator, graded, harmless(args.data, args.work), rng)
    made = Calibrator(
        model,
        calibrator.reference,
        calibrator.tokenizer,
        config=calibrator.config,
        context_length=calibrator.context_length,
        record=dict(calibrator.record),
        name=calibrator.name,
        probes=calibrator.probes,
    )
    made.save_pretrained(args.out, dtype=torch.float16)


if __name__ == "__main__":
    main()
