"""Train and evaluate the package's two toxicity scorers.

Both learn from human labels, namely the half that the classifier of the models' training text has
not seen, and from harmless dialogues and encyclopedia text, especially text that names groups of
people. A scorer trained on labelled text alone learns that naming a group is toxic (Dixon et al.
2018). ::

    python -m recipes.english_data --data DATA --out WORK
    python -m benchmarks.train_scorers --data DATA --work WORK

writes ``lexical.*`` and ``contextual.*`` to ``fusion_detox/scoring/``. The Perspective scores of
RealToxicityPrompts are used for evaluation only; nothing was tuned on them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fusion_detox.scoring import lexical
from fusion_detox.scoring.contextual import CONTEXTUAL, ContextualScorer, head
from fusion_detox.scoring.embedding import Embedder
from recipes.english_data import read

log = logging.getLogger("train_scorers")
SEED = 20261120
GROUPS = re.compile(
    r"\b(gay|lesbian|transgender|queer|homosexual|wom[ae]n|black|white|african|asian|mexican|latino"
    r"|hispanic|jew|jewish|muslim|islam|christian|catholic|immigrant|refugee|disabled|blind|deaf"
    r"|arab|chinese|indian|native american)s?\b",
    re.IGNORECASE,
)
PEOPLE = (
    "gay", "lesbian", "bisexual", "transgender", "trans", "queer", "straight", "black", "white",
    "Asian", "African", "Mexican", "Latino", "Hispanic", "Jewish", "Muslim", "Christian", "Hindu",
    "Catholic", "Buddhist", "Arab", "Chinese", "Indian", "Pakistani", "Turkish", "Iraqi", "Syrian",
    "Nigerian", "Somali", "Irish", "Polish", "Roma", "immigrant", "refugee", "disabled", "blind",
    "deaf", "autistic", "old", "young", "homeless", "poor", "Native American", "Puerto Rican",
)  # fmt: skip
PLACES = (
    "Mexico", "Africa", "China", "India", "Pakistan", "Syria", "Somalia", "Nigeria", "Haiti",
    "Iran", "Iraq", "Israel", "Palestine", "Turkey", "Russia", "Poland", "Ireland", "Brazil",
    "Puerto Rico", "Guatemala", "Ethiopia", "Vietnam", "Japan", "Korea", "the Middle East",
)  # fmt: skip
NEUTRAL_PLACES = (
    "immigrants from {} opened a shop here", "the family comes from {}", "he is from {}",
    "a nurse from {} looked after my mother", "trade with {} grew last year",
)  # fmt: skip
NEUTRAL = (
    "my {} friend came over for dinner", "the {} students in our school won a prize",
    "a {} woman opened a bakery on our street", "he grew up in a {} family in Ohio",
    "the city has had a {} mayor since last spring", "several {} writers will read at the library",
    "I talked with a {} man on the train about his work", "our doctor is a {} woman",
    "the museum shows paintings by {} artists", "they are a {} couple with two children",
    "she is {} and works as an engineer", "{} people", "many {} people live in this part of town",
    "the film is about a {} teenager who learns to sing",
)  # fmt: skip
SOURCES = {
    "davidson2017": "Davidson et al. 2017, MIT",
    "safenlp_toxiGen": "ToxiGen via SafeNLP, MIT",
    "safenlp_implicitHate": "Implicit Hate via SafeNLP, MIT",
    "paradetox": "ParaDetox, CC0 1.0",
    "templates": "harmless sentences that name groups, in train_scorers.py, Apache-2.0",
    "general": "Schema-Guided Dialogue, CC BY-SA 4.0; Topical-Chat, CDLA-Sharing 1.0; "
    "WikiText-2, CC BY-SA 3.0",
}


def sentences(text: str) -> list[str]:
    """Split a text at sentence ends into pieces of about 160 characters."""
    pieces, current = [], ""
    for sentence in re.split(r"(?<=[.!?\n])\s+", text):
        if current and len(current) + len(sentence) > 160:
            pieces.append(current)
            current = ""
        current = f"{current} {sentence}".strip()
    return [*pieces, current]


def harmless(texts: Sequence[str], rng: random.Random) -> list[str]:
    """Random sentences, sentences that name groups of people, and fragments of 1 to 12 words."""
    pieces = [piece for text in texts for piece in sentences(text) if len(piece) > 20]
    naming = [piece for piece in pieces if GROUPS.search(piece)]
    chosen = rng.sample(pieces, 10_000) + rng.sample(naming, min(len(naming), 4000))
    for piece in rng.sample(pieces, 6000):
        words = piece.split(" ")
        start, size = rng.randrange(len(words)), rng.randint(1, 12)
        chosen.append(" ".join(words[start : start + size]))
    chosen += [mark for mark in ".,!?;:-'\"()" for _ in range(4)]
    return chosen


def naming() -> list[str]:
    """Harmless sentences that name groups and places, twice each."""
    return 2 * [
        sentence.format(name)
        for names, frames in ((PEOPLE, NEUTRAL), (PLACES, NEUTRAL_PLACES))
        for name in names
        for sentence in frames
    ]


def write(path: Path, tensors: dict[str, NDArray[Any]], record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.chmod(0o644)
    os.replace(temporary, path)
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path.with_suffix(".json"))
    log.info("%s: %d bytes", path, path.stat().st_size)


def quantised(values: NDArray[np.float32], kind: type[np.integer[Any]]) -> dict[str, NDArray[Any]]:
    scale = np.array([np.abs(values).max() / np.iinfo(kind).max], dtype=np.float32)
    return {"": np.round(values / scale).astype(kind), "_scale": scale}


def train_lexical(texts: list[str], labels: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    width = lexical.CHARACTER_BUCKETS + lexical.WORD_BUCKETS
    counts = np.zeros(width)
    for text in texts:
        counts[lexical.hashed_features(text)[0]] += 1
    exact = (np.log((1 + len(texts)) / (1 + counts)) + 1).astype(np.float32)
    idf = quantised(exact, np.uint8)
    rounded = idf[""].astype(np.float32) * idf["_scale"]
    rows = [lexical.weighted_features(text, rounded) for text in texts]
    matrix = csr_matrix(
        (
            np.concatenate([values for _, values in rows]),
            np.concatenate([buckets for buckets, _ in rows]),
            np.cumsum([0] + [len(buckets) for buckets, _ in rows]),
        ),
        shape=(len(rows), width),
    )
    model = LogisticRegression(C=4.0, max_iter=300).fit(matrix, labels)
    weights = quantised(model.coef_[0].astype(np.float32), np.int16)
    tensors = {f"weights{name}": value for name, value in weights.items()}
    tensors |= {f"idf{name}": value for name, value in idf.items()}
    return tensors | {"bias": model.intercept_.astype(np.float32)}


def embed(texts: list[str], work: Path) -> torch.Tensor:
    """Sentence embeddings, cached in a file."""
    cache = work / "embeddings.npz"
    known: dict[str, NDArray[np.float32]] = {}
    if cache.exists():
        with np.load(cache) as stored:
            known = dict(zip(stored["keys"].tolist(), stored["values"], strict=True))
    keys = [hashlib.md5(text.encode()).hexdigest() for text in texts]
    new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    if new:
        known |= dict(zip(new, Embedder()(list(new.values())).numpy(), strict=True))
        np.savez(cache, keys=np.array(list(known)), values=np.stack(list(known.values())))
    return torch.from_numpy(np.stack([known[key] for key in keys]))


def train_contextual(
    texts: list[str], labels: NDArray[np.int64], work: Path, dev: list[dict[str, Any]]
) -> dict[str, NDArray[Any]]:
    """Weights of the best of 30 epochs by AUC on the development labels."""
    inputs, outputs = embed(texts, work), torch.from_numpy(labels).float()
    dev_inputs = embed([row["text"] for row in dev], work)
    dev_labels = [row["toxic"] for row in dev]
    torch.manual_seed(SEED)
    model = head(inputs.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    best, best_auc = {}, 0.0
    for epoch in range(30):
        model.train()
        for rows in torch.randperm(len(inputs)).split(256):
            logits = model(inputs[rows]).squeeze(1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, outputs[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            auc = roc_auc_score(dev_labels, model(dev_inputs).squeeze(1).numpy())
        if auc > best_auc:
            best_auc = float(auc)
            best = {name: value.numpy().copy() for name, value in model.state_dict().items()}
        log.info("contextual: epoch %d, development AUC %.4f", epoch, auc)
    return best


def shuffled(texts: list[str], rng: random.Random) -> list[str]:
    """Copies with the words in random order.

    Small models often write broken text. A scorer that has only seen whole sentences mistakes
    broken text that names a group for toxic text. Shuffled copies, labelled alike, prevent this.
    """
    result = []
    for text in texts:
        words = text.split()
        rng.shuffle(words)
        result.append(" ".join(words))
    return result


def measure(
    score: Callable[[Sequence[str]], list[float]], work: Path, data: Path
) -> dict[str, float]:
    """AUC on held-out human labels, overall and by source, and against Perspective."""
    test = [row for row in read(work / "test_general.jsonl") if row["source"] != "web_posts"]
    scores = np.array(score([row["text"] for row in test]))
    labels = np.array([bool(row["toxic"]) for row in test])
    sources = np.array([row["source"] for row in test])
    human = sources != "general"
    result = {"human_labels": roc_auc_score(labels[human], scores[human])}
    for source in sorted(set(sources[human])):
        rows = sources == source
        result[f"human_labels_{source}"] = roc_auc_score(labels[rows], scores[rows])
    result["harmless_text_scored_toxic"] = float((scores[~human] >= 0.5).mean())
    perspective: list[tuple[float, bool]] = []
    for name in ("rtp_challenging", "rtp_nontoxic"):
        rows_ = [row["continuation"] for row in read(data / f"{name}.jsonl")]
        rows_ = [row for row in rows_ if row["toxicity"] is not None]
        part = list(zip(score([row["text"] for row in rows_]),
                        [row["toxicity"] >= 0.5 for row in rows_], strict=True))  # fmt: skip
        result[f"perspective_{name}"] = roc_auc_score([y for _, y in part], [s for s, _ in part])
        perspective += part
    result["perspective_both"] = roc_auc_score(
        [y for _, y in perspective], [s for s, _ in perspective]
    )
    return {name: round(float(value), 4) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="output of recipes.english_data")
    parser.add_argument("--only", choices=("lexical", "contextual"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    human = read(args.work / "labels_b.jsonl")
    general = [row["text"] for row in read(args.work / "clean.jsonl") if row["source"] == "general"]
    plain = harmless(general, random.Random(SEED))
    named = naming()
    texts = [row["text"] for row in human] + plain + named
    labels = np.array([int(row["toxic"]) for row in human] + [0] * (len(plain) + len(named)))
    rows = {"general": len(plain), "templates": len(named)}
    rows |= {
        source: sum(r["source"] == source for r in human)
        for source in SOURCES
        if source not in rows
    }
    dev = [r for r in read(args.work / "dev_general.jsonl") if r["source"] != "web_posts"]
    log.info("%d texts, %d of them toxic", len(texts), labels.sum())
    record = {
        "labels": "human labels only; no model's or service's scores",
        "training_rows": len(texts),
        "sources": {
            source: {"rows": rows[source], "licence": licence}
            for source, licence in SOURCES.items()
        },
        "seed": SEED,
        "command": "python -m benchmarks.train_scorers --data DATA --work WORK",
        "versions": {
            name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "torch")
        },
    }
    if args.only != "contextual":
        path = Path(lexical.__file__).with_suffix(".safetensors")
        write(path, train_lexical(texts, labels), record)
        auc = measure(lexical.LexicalScorer.load().score, args.work, args.data)
        log.info("lexical: %s", auc)
        model = "logistic regression on hashed character n-grams and words"
        path.with_suffix(".json").write_text(
            json.dumps({"name": "lexical", "model": model, **record, "auc": auc}, indent=2) + "\n"
        )
    if args.only != "lexical":
        half = random.Random(SEED).sample(range(len(texts)), len(texts) // 2)
        broken = shuffled([texts[i] for i in half], random.Random(SEED))
        record = {**record, "training_rows": len(texts) + len(broken), "shuffled": len(broken)}
        write(
            CONTEXTUAL,
            train_contextual(texts + broken, np.append(labels, labels[half]), args.work, dev),
            record,
        )
        auc = measure(ContextualScorer().score, args.work, args.data)
        log.info("contextual: %s", auc)
        model = "two-layer network on all-MiniLM-L6-v2 sentence embeddings (Apache-2.0)"
        CONTEXTUAL.with_suffix(".json").write_text(
            json.dumps({"name": "contextual", "model": model, **record, "auc": auc}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
