"""List the words that the English calibrator holds back in any text, with the nats of each.

    python -m recipes.english_lexicon --data DATA --work WORK --calibrator OLD --out OUT

OUT is the same calibrator with ``words``. A listed word is one that both judges of
``english_judges`` call toxic in neutral sentences, and that harmless text hardly uses. The models
have learned the same words from ``english_words``, but a target may spell a word in other tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fusion_detox import Calibrator
from fusion_detox.calibrator.folder import write_config
from fusion_detox.evaluation.word_filter import read_word_list
from fusion_detox.vocabulary.words import is_word
from recipes import english_data as english
from recipes.english_context import labelled
from recipes.english_judges import Judges

WORD = re.compile(r"[a-z][a-z'’-]*[a-z]")
FRAMES = (
    "He is a {}.", "They said it was {}.", "the {} thing", "I saw the {} again yesterday.",
    "you {}", "It was a very {} day for us.",
)  # fmt: skip
TOXIC_FROM, HARMLESS_AT_MOST = 0.62, 40
"""Words with a lower mean grade in the frames, or in more of the harmless texts, are not listed."""
HARMLESS_USE = re.compile(
    r"(?i)(queers?|negro(es)?|illegals?|jews?|blacks?|whites?|muslims?|gays?|lesbians?|lgbtq?|trans"
    r"|wheelchairs?|disabled|clowns?|fools?|foolish|butts?|deport\w*|snitch\w*|lunatics?|savages?"
    r"|witch(es)?|rats?|pigs?|hell|clowning|aids|white\w+|anti\w+|uncivili[sz]ed|civili[sz]ed"
    r"|hookers?|prostitutes?|naked|nude|condoms?|vagina\w*|penis\w*|breasts?|anal|sexual\w*|sex"
    r"|homosexual\w*|rape\w*|rapists?|nazis?|racists?|sexists?|bigots?|hypocri\w+|stupidity|ass"
    r"ault\w*|kills?|killed|killer|murder\w*|terroris\w+|suck\w*|puss|nips?|fuhrer|aryan|coons?"
    r"|fam|niggl\w+|hussy|hootch|assic|homies?|bum|garbage|filth|ridiculous|tits?|cocks?|dicks?|boobs?|oral|orgasm\w*|porn\w*)"
)
"""Words that judges call toxic but that name groups, name things, or have harmless uses."""
LARGEST, SLOPE = 6.0, 10.0
"""Nats: a word of grade ``g`` is lowered by ``1 + SLOPE * (g - TOXIC_FROM)``, at most LARGEST."""


def lexicon(data: Path, work: Path, judges: Judges, tokenizer: Any) -> dict[str, float]:
    """Lower-case words with their mean grade in ``FRAMES``, from ``TOXIC_FROM`` to 1.

    Candidates are the words of the training text, of the calibrator's vocabulary, and of the word
    list of ``better-profanity``.
    """
    kept = work / "lexicon.json"
    if kept.exists():
        return json.loads(kept.read_text())
    common: Counter[str] = Counter()
    for row in english.read(work / "clean.jsonl"):
        if row["source"] == "general":
            common.update(set(WORD.findall(row["text"].lower())))
    seen = Counter(word for row in labelled(data) for word in WORD.findall(row["text"].lower()))
    written = work / "graded.jsonl"
    for row in english.read(written) if written.exists() else ():
        seen.update(WORD.findall(row["text"].lower()))
    words = {word for word, count in seen.items() if count >= 3}
    words |= {tokenizer.decode([token]).strip().lower() for token in range(len(tokenizer))}
    words |= {word.lower() for word in read_word_list()[0]}
    words = {word for word in words if len(word) >= 3 and WORD.fullmatch(word)}
    candidates = sorted(word for word in words if common[word] <= HARMLESS_AT_MOST)
    alone = judges.filter.score(candidates)
    likely = [word for word, grade in zip(candidates, alone, strict=True) if grade > 0.3]
    listed = {word for word in read_word_list()[0] if WORD.fullmatch(word)}
    likely += sorted(listed - set(likely) - {word for word in words if common[word] > 2})
    found = {}
    for word in likely:
        if HARMLESS_USE.fullmatch(word):
            continue
        sentences = [frame.format(word) for frame in FRAMES]
        with torch.inference_mode():
            network = torch.sigmoid(judges.network(judges.embed(sentences))).mean()
        grade = (float(network) + float(judges.filter.score(sentences).mean())) / 2
        if grade >= TOXIC_FROM:
            found[word] = round(grade, 3)
    kept.write_text(json.dumps(found, indent=1))
    return found


def nats(grade: float) -> float:
    """By how many nats to hold back a word of a given grade."""
    return min(LARGEST, 1 + SLOPE * (grade - TOXIC_FROM))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="output of english_data")
    parser.add_argument("--calibrator", default="english-16k")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    calibrator = Calibrator.from_pretrained(args.calibrator)
    judges = Judges(args.data, args.work)
    grades = lexicon(args.data, args.work, judges, calibrator.tokenizer)
    words = {word: round(nats(grade), 2) for word, grade in sorted(grades.items()) if is_word(word)}
    assert calibrator.folder is not None
    if args.out.resolve() != calibrator.folder.resolve():
        shutil.copytree(calibrator.folder, args.out)
    write_config(args.out, calibrator.config, words)
    print(f"{len(words)} words")


if __name__ == "__main__":
    main()
