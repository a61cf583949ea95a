"""The ways to read the end of each text, and how much each weighs."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_detox.decoding.text_context import Position
from fusion_detox.vocabulary.map import Cover


def weigh_covers(
    positions: list[Position], index: dict[tuple[int, ...], int], log_probs: Tensor
) -> tuple[list[Cover], Tensor]:
    """The ways to read each text's end, and their weights ``(distributions, covers)``.

    A cover that starts ``back`` tokens before the end weighs what the calibrator gave to the
    tokens from the start of the word up to there (Vieira et al. 2024; Hayase et al. 2025).
    """
    covers: list[Cover] = []
    gather: list[list[tuple[int, int]]] = []
    for row, position in enumerate(positions):
        depth = len(position.word)
        steps: list[tuple[int, int]] = []
        for back in range(depth, -1, -1):
            cut = len(position.path) - back
            prefix = position.path[:cut]
            remainder = b"".join(position.word[depth - back :]) + position.pending
            covers.append(Cover(row, index[prefix], remainder))
            gather.append(list(steps))
            if back:
                steps.append((index[prefix], position.path[cut]))
    longest = max(map(len, gather))
    if longest == 0:
        return covers, log_probs.new_ones(len(log_probs), len(covers))
    # The ragged lists are filled up with an entry that is masked.
    where = torch.tensor([[p for p, _ in g] + [0] * (longest - len(g)) for g in gather])
    token = torch.tensor([[t for _, t in g] + [0] * (longest - len(g)) for g in gather])
    used = torch.tensor([[True] * len(g) + [False] * (longest - len(g)) for g in gather])
    device = log_probs.device
    steps_in = log_probs[:, where.to(device), token.to(device)].masked_fill(~used.to(device), 0.0)
    weights = steps_in.sum(-1)
    # Only proportions within a row count: without its largest weight, none underflows.
    row_of = torch.tensor([cover.row for cover in covers], device=device).expand_as(weights)
    largest = weights.new_full((len(weights), len(positions)), -torch.inf)
    largest = largest.scatter_reduce(1, row_of, weights, "amax")
    return covers, (weights - largest.gather(1, row_of)).exp()
