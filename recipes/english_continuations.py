"""Text by real models: continuations of provoking prompts, and answers to harmless questions.

    python -m recipes.english_continuations --data DATA --work WORK

SmolLM2-135M-Instruct (``packaged:smollm2``) continues training prompts of RealToxicityPrompts, 16
times each, and answers harmless questions in its chat template. Of the challenging prompts, those
whose MD5 modulo 10 is below 4 are for training, 4 is for development, and 5 and above are for
measuring only. A run that is stopped resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path

from fusion_detox.files.models import load_target
from fusion_detox.generation.sampling import Sampling, generate_rows, jobs
from recipes.english_data import read

SAMPLES, NEW_TOKENS, ANSWER_TOKENS, BATCH = 16, 20, 60, 96
DEVELOPMENT = 48
"""The first questions are kept for development."""
TOPICS = (
    "bread", "coffee", "rice", "pasta", "tomato soup", "pancakes", "a salad", "chicken curry",
    "green tea", "an omelette", "a houseplant", "tomatoes in pots", "a bicycle", "a used car",
    "a mortgage", "a bank account", "a job interview", "a cover letter", "a birthday card",
    "a wedding speech", "a science fair project", "photosynthesis", "gravity", "the water cycle",
    "volcanoes", "the moon", "the French Revolution", "the Roman Empire", "the Silk Road",
    "the printing press", "democracy", "inflation", "interest rates", "a budget",
    "running a marathon", "stretching", "sleep", "headaches", "a cold", "vaccines", "vitamins",
    "learning Spanish", "learning guitar", "chess openings", "drawing faces", "photography",
    "a hiking trip", "a trip to Japan", "a weekend in Lisbon", "packing a suitcase", "a dog",
    "a cat", "an aquarium", "beekeeping", "compost", "solar panels", "electric cars",
    "recycling", "Python lists", "a for loop", "SQL joins", "git branches",
    "regular expressions", "HTML tables", "spreadsheets", "passwords", "Wi-Fi problems",
    "a slow laptop", "a book club", "poetry", "a short story", "Shakespeare", "jazz",
    "the piano", "a garden party", "a school play", "homework", "fractions", "percentages",
    "algebra", "geometry", "a thank-you note", "a complaint to a hotel", "a meeting agenda",
    "remote work", "a difficult colleague", "stress", "meditation", "friendship",
    "a new neighbour", "moving house", "a leaking tap", "painting a room", "a wooden shelf",
    "knitting", "sewing a button", "a picnic", "camping", "a tent", "the weather",
    "thunderstorms", "earthquakes", "whales", "dinosaurs", "honey", "chocolate", "cheese",
    "breakfast",
)  # fmt: skip
REQUESTS = (
    "Tell me about {}.", "Give me three tips about {}.", "What should a beginner know about {}?",
    "Write a short paragraph about {}.", "Explain {} to a ten-year-old.",
    "Why do people care about {}?", "What are common mistakes with {}?",
    "List five facts about {}.", "How do I get started with {}?",
    "Write a friendly email to a colleague about {}.",
    "What is a good question to ask about {}?", "Compare two ways to deal with {}.",
)  # fmt: skip
PEOPLE = (
    "Black", "white", "Jewish", "Muslim", "Christian", "Hindu", "gay", "lesbian", "transgender",
    "disabled", "blind", "deaf", "Mexican", "Chinese", "Indian", "Nigerian", "Turkish", "Polish",
    "elderly", "young", "homeless", "immigrant", "Native American", "autistic",
)  # fmt: skip
ABOUT_PEOPLE = (
    "Write two sentences about a {} teacher who loves hiking.",
    "Describe a {} family's weekend in the city.",
    "How can a school make {} students feel welcome?",
    "My {} friend got a new job. What should I say?",
)  # fmt: skip
OTHER = (
    "How do I terminate a hung process on Linux?",
    "What does the idiom 'kill two birds with one stone' mean?",
    "How do I shoot a portrait in low light?", "What is the best way to beat egg whites?",
    "My boss criticised my work. How should I reply?",
    "Someone was rude to me on the bus. How do I let it go?",
    "How do I deal with an angry customer?", "Is it normal to feel sad after moving?",
    "What are the symptoms of the flu?", "Explain why some jokes offend people.",
    "What is sex education taught for?", "How do I explain death to a child?",
    "What is the history of the word 'queer'?", "Summarise the civil rights movement.",
    "What was apartheid?", "Describe a villain for my fantasy novel.",
    "Write a tense scene in which two brothers argue.", "How do doctors treat breast cancer?",
    "What happens in a boxing match?", "Why do cats bite?",
)  # fmt: skip


def part(prompt: str) -> str:
    """Which part of the challenging prompts a prompt belongs to."""
    number = int(hashlib.md5(prompt.encode()).hexdigest(), 16) % 10
    return "training" if number < 4 else "development" if number == 4 else "measuring"


def questions() -> list[str]:
    """Harmless requests, in random order; none of them is in the package's assistant suite."""
    rng = random.Random(5)
    general = [request.format(topic) for topic in TOPICS for request in REQUESTS]
    rng.shuffle(general)
    people = [request.format(person) for person in PEOPLE for request in ABOUT_PEOPLE]
    rng.shuffle(people)
    chosen = [*general[:420], *people[:60], *OTHER]
    rng.shuffle(chosen)
    random.Random(9).shuffle(chosen)
    return chosen


def complete(target: str, prompts: list[str], out: Path, sampling: Sampling, *, chat: bool) -> None:
    """Append the continuations of the prompts that ``out`` lacks."""
    done = {row["prompt"] for row in read(out)} if out.exists() else set()
    missing = [prompt for prompt in prompts if prompt not in done]
    if not missing:
        return
    model, tokenizer = load_target(target, dtype="float32")
    with out.open("a", encoding="utf-8") as file:
        wanted = jobs(missing, sampling.samples, chat=chat)
        texts: list[str] = []
        for row in generate_rows(model, tokenizer, wanted, sampling, batch_size=BATCH):
            texts.append(row.completion.text)
            if row.job.sample == sampling.samples - 1:
                line = {"prompt": row.job.prompt, "writer": target, "continuations": texts}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                texts = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="output of recipes.english_data")
    parser.add_argument("--target", default="packaged:smollm2")
    parser.add_argument("--prompts", type=int, help="number of provoking prompts (default: all)")
    parser.add_argument("--questions", type=int, default=320)
    args = parser.parse_args()
    rows = read(args.data / "rtp_challenging.jsonl")
    prompts = [row["prompt"]["text"] for row in rows if part(row["prompt"]["text"]) == "training"]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, top_p=0.93, samples=SAMPLES, seed=17)
    out = args.work / "target_continuations.jsonl"
    complete(args.target, prompts[: args.prompts], out, sampling, chat=False)
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, top_p=0.93, seed=17)
    out = args.work / "target_answers.jsonl"
    kept = questions()[DEVELOPMENT : DEVELOPMENT + args.questions]
    complete(args.target, kept, out, sampling, chat=True)


if __name__ == "__main__":
    main()
