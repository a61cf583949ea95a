"""Two judges of toxicity that grade the training text of the English calibrator's second stage.

One is a TF-IDF classifier, which knows words. The other is a small network on sentence embeddings,
which also detects implied toxicity. Both are trained here on the half of the human labels that no
scorer of the package has seen. The network is of the same kind as the package's contextual scorer.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks import train_scorers
from fusion_detox.scoring.contextual import head
from fusion_detox.scoring.embedding import Embedder
from recipes import english_data as english

NETWORK_SHARE = 0.8
"""Weight of the network's grade. It is high because language modelling has already taught words."""
DIMENSIONS, EPOCHS = 384, 8


class Judges:
    """Weighted mean of two judges' probabilities that a text is toxic.

    Args:
        data: Folder of the data sets.
        work: Output of ``english_data``; the trained network is kept there.
    """

    def __init__(self, data: Path, work: Path) -> None:
        human = [r for r in english.labelled(data) if english.bucket("half" + r["text"]) < 50]
        rows = [row for row in human if english.bucket(row["text"]) >= 4]
        encyclopedia = [row["text"] for row in english.rows(data / "general.jsonl.gz")]
        pieces = [piece for text in encyclopedia[::4] for piece in english.chunks(text)[:2]]
        self.filter = english.Filter()
        self.filter.fit(
            [row["text"] for row in rows] + pieces,
            [int(row["toxic"]) for row in rows] + [0] * len(pieces),
        )
        self.embed = Embedder()
        kept = work / "judge.safetensors"
        if not kept.exists():  # takes ten minutes, mostly for embeddings
            trained = self._train(rows, english.read(work / "clean.jsonl"))
            save_file(trained.state_dict(), kept)
        self.network = head(DIMENSIONS)
        self.network.load_state_dict(load_file(kept))
        self.network.eval()

    def _train(self, rows: list[dict], clean: list[dict]) -> torch.nn.Module:
        general = [row["text"] for row in clean if row["source"] == "general"]
        plain = train_scorers.harmless(general, random.Random(99)) + train_scorers.naming()
        texts = [row["text"] for row in rows] + plain
        labels = [int(row["toxic"]) for row in rows] + [0] * len(plain)
        half = random.Random(3).sample(range(len(texts)), len(texts) // 2)
        texts += train_scorers.shuffled([texts[at] for at in half], random.Random(3))
        outputs = torch.tensor(labels + [labels[at] for at in half]).float()
        inputs = self.embed(texts)
        torch.manual_seed(4)
        network = head(DIMENSIONS)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
        for _ in range(EPOCHS):
            for part in torch.randperm(len(inputs)).split(256):
                logits = network(inputs[part]).squeeze(1)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, outputs[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return network

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> np.ndarray:
        """``(texts,)`` probabilities of toxicity."""
        shown = [text if text.strip() else "." for text in texts]
        network = torch.sigmoid(self.network(self.embed(shown)).squeeze(1)).numpy()
        return NETWORK_SHARE * network + (1 - NETWORK_SHARE) * self.filter.score(shown)
