"""The paper's alignment loss, InfoNCE, and the training loop that minimises it.

Source: arXiv 2506.01266; InfoNCE is from van den Oord et al. 2018 (arXiv 1807.03748).
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


def infonce_loss(
    matrix: Tensor,
    source: Tensor,
    target: Tensor,
    batch: Tensor,
    negatives: int,
    generator: torch.Generator,
) -> Tensor:
    """Compute InfoNCE with one positive and K random negatives, averaged over a batch of tokens.

    ``-log(exp s(t, t) / (exp s(t, t) + sum_n exp s(t, n)))``, where ``s(t, n) = (e_t A) . e'_n`` is
    the dot product of a projected calibrator embedding and a target embedding.

    Args:
        matrix: ``A``, ``(calibrator width, target width)``.
        source: ``e``, ``(tokens, calibrator width)``, the calibrator's embeddings.
        target: ``e'``, ``(tokens, target width)``, the target's embeddings of the same tokens.
        batch: ``(batch,)``, row numbers of the tokens ``t``.
        negatives: K, the number of tokens ``n`` to draw for each ``t``.
        generator: Draws the negatives.

    Returns:
        The mean loss in nats, a scalar.
    """
    projected = source[batch] @ matrix
    positive = (projected * target[batch]).sum(-1, keepdim=True)
    drawn = torch.randint(len(source), (len(batch), negatives), generator=generator)
    negative = torch.einsum("bd,bkd->bk", projected, target[drawn])
    # A token is not its own negative.
    negative = negative.masked_fill(drawn == batch[:, None], -torch.inf)
    scores = torch.cat([positive, negative], 1)
    return torch.nn.functional.cross_entropy(scores, torch.zeros(len(batch), dtype=torch.long))


def train_infonce(
    matrix: Tensor,
    source: Tensor,
    target: Tensor,
    config: AlignmentConfig,
    generator: torch.Generator,
    *,
    show_progress: bool,
) -> Tensor:
    """Minimise :func:`infonce_loss` with Adam, starting from ``matrix``.

    Args:
        matrix: ``(calibrator width, target width)``; it is not changed.
        source: ``(tokens, calibrator width)``.
        target: ``(tokens, target width)``.
        config: Epochs, batch size, learning rate and number of negatives.
        generator: Draws the order and the negatives.
        show_progress: Whether to show a progress bar on standard error.

    Returns:
        The trained matrix.

    Raises:
        AlignmentError: Training diverged.
    """
    matrix = matrix.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([matrix], lr=config.learning_rate)
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
        steps = math.ceil(len(source) / config.batch_size)
        task = progress.add_task("", total=config.epochs * steps, loss="")
        for _ in range(config.epochs):
            order = torch.randperm(len(source), generator=generator)
            for batch in torch.split(order, config.batch_size):
                loss = infonce_loss(matrix, source, target, batch, config.negatives, generator)
                value = float(loss.detach())
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                if not math.isfinite(value) or not bool(torch.isfinite(matrix).all()):
                    raise AlignmentError(
                        f"training diverged at learning_rate {config.learning_rate:g}: use a "
                        "smaller one, or epochs=0 to keep the initial matrix"
                    )
                progress.update(task, advance=1, loss=f"loss {value:.3f}")
    return matrix.detach()
