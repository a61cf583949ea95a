"""Learning the matrix that carries a calibrator's vectors over to a target's space.

In closed form, or by InfoNCE with one positive and K random negatives (arXiv 2506.01266; van den
Oord et al. 2018), or by the latter from the former.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fusion_detox.errors import AlignmentError

if TYPE_CHECKING:
    from fusion_detox.alignment.config import AlignmentConfig

_QUERIES = 1024


def learn(own: Tensor, target: Tensor, config: AlignmentConfig, *, show_progress: bool) -> Tensor:
    """The matrix for tokens that both models know.

    Args:
        own: ``(tokens, calibrator width)`` embeddings in float32.
        target: ``(tokens, target width)`` embeddings of the same tokens in float32.
        config: How.
        show_progress: Whether to show a bar on standard error.

    Returns:
        ``(calibrator width, target width)`` in float32.

    Raises:
        AlignmentError: Training diverged, or the identity is asked of two widths.
    """
    generator = torch.Generator().manual_seed(config.seed)
    matrix = _start(own, target, config, generator)
    if config.epochs:
        matrix = _train(matrix, own, target, config, generator, show_progress)
    if not bool(torch.isfinite(matrix).all()):
        raise _diverged(config)
    return matrix


def retrieval(queries: Tensor, candidates: Tensor, right: Tensor) -> dict[str, float]:
    """How often the right candidate is the nearest, or among the ten nearest, by cosine.

    Args:
        queries: ``(queries, width)``.
        candidates: ``(candidates, width)``.
        right: ``(queries,)`` index of each query's own candidate.

    Returns:
        ``"at_1"`` and ``"at_10"``, in 0..1.
    """
    nearest = torch.nn.functional.normalize(candidates, dim=-1).t()
    ranks = []
    for start in range(0, len(queries), _QUERIES):
        part = slice(start, start + _QUERIES)
        similarity = queries[part] @ nearest  # a query's own length does not change its order
        own = similarity.gather(1, right[part, None])
        # Ties count against it, and so does what is no number: a collapsed matrix finds nothing.
        ranks.append((~(similarity < own)).sum(1) - 1)
    rank = torch.cat(ranks)
    return {f"at_{k}": round(float((rank < k).float().mean()), 6) for k in (1, 10)}


def _start(
    own: Tensor, target: Tensor, config: AlignmentConfig, generator: torch.Generator
) -> Tensor:
    rows, columns = own.shape[1], target.shape[1]
    if config.start == "identity":
        if rows != columns:
            raise AlignmentError(
                f"the calibrator's vectors have {rows} entries and the target's {columns}, so that "
                "start='identity' cannot carry them over: choose another start"
            )
        return torch.eye(rows)
    if config.start == "random":
        return torch.randn(rows, columns, generator=generator) / math.sqrt(rows)
    # What all tokens share says nothing of which is which: of logits it is a constant.
    one, other = own - own.mean(0), target - target.mean(0)
    if config.start == "procrustes":
        left, _, right = torch.linalg.svd(one.t() @ other, full_matrices=False)
        # With the ratio of the lengths, so that the vectors come out as long as the target's.
        scale = other.square().sum().sqrt() / one.square().sum().sqrt().clamp_min(1e-12)
        orthogonal: Tensor = left @ right
        return orthogonal * scale
    if config.start == "ridge":
        return _solve(_regular(one, config.ridge), one.t() @ other)
    # ``other @ matrix.T`` is ``one``: both output layers then say the same of a vector.
    return _solve(_regular(other, config.ridge), other.t() @ one).t().contiguous()


def _solve(left: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.solve(left, right)
    return solution


def _regular(embeddings: Tensor, ridge: float) -> Tensor:
    gram = embeddings.t() @ embeddings
    weight = ridge * gram.diagonal().mean().clamp_min(1e-12)
    return gram + weight * torch.eye(len(gram))


def _train(
    matrix: Tensor,
    own: Tensor,
    target: Tensor,
    config: AlignmentConfig,
    generator: torch.Generator,
    show_progress: bool,
) -> Tensor:
    """InfoNCE: ``-log(exp s(t, t) / (exp s(t, t) + sum of exp s(t, n)))``, ``s = (e A) . e'``."""
    matrix = matrix.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([matrix], lr=config.learning_rate)
    steps = -(-len(own) // config.batch_size)
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("alignment"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        disable=not (show_progress and console.is_terminal),
        transient=True,
    )
    with torch.enable_grad(), progress:
        task = progress.add_task("", total=config.epochs * steps, loss="")
        for _ in range(config.epochs):
            order = torch.randperm(len(own), generator=generator)
            for start in range(0, len(own), config.batch_size):
                batch = order[start : start + config.batch_size]
                loss = _loss(matrix, own, target, batch, config, generator)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise _diverged(config)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                progress.update(task, advance=1, loss=f"loss {value:.3f}")
    return matrix.detach()


def _diverged(config: AlignmentConfig) -> AlignmentError:
    return AlignmentError(
        f"the alignment diverged at learning_rate {config.learning_rate:g}: give a smaller one, or "
        "epochs=0 for the closed form alone"
    )


def _loss(
    matrix: Tensor,
    own: Tensor,
    target: Tensor,
    batch: Tensor,
    config: AlignmentConfig,
    generator: torch.Generator,
) -> Tensor:
    carried = own[batch] @ matrix
    if config.negatives_from == "batch":
        scores, answer = carried @ target[batch].t(), torch.arange(len(batch))
    else:
        scores = (carried * target[batch]).sum(-1, keepdim=True)
        answer = torch.zeros(len(batch), dtype=torch.long)
    if config.negatives:
        drawn = torch.randint(len(own), (len(batch), config.negatives), generator=generator)
        against = torch.einsum("bd,bkd->bk", carried, target[drawn])
        # A token is no negative of itself.
        against = against.masked_fill(drawn == batch[:, None], -torch.inf)
        scores = torch.cat([scores, against], 1)
    return torch.nn.functional.cross_entropy(scores, answer)
