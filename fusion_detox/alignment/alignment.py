"""``align`` learns a matrix from a calibrator's hidden space to a target's; ``Alignment`` holds it.

The two models share tokens, which are matched by their bytes. ``align`` learns a matrix that maps
the calibrator's embeddings of these tokens to the target's: by default the orthogonal Procrustes
solution, or InfoNCE training as in arXiv 2506.01266 (``AlignmentConfig.paper()``). The aligned
rules then project the calibrator's last hidden state with this matrix at each step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.alignment.embeddings import (
    EmbeddingTable,
    calibrator_embeddings,
    checkpoint_embeddings,
    model_embeddings,
)
from fusion_detox.alignment.infonce import train_infonce
from fusion_detox.errors import AlignmentError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fusion_detox.calibrator.calibrator import Calibrator

_SAMPLED_ROWS = 64
_QUERIES = 1024
_ROUNDING = 3e-3
"""Relative difference of embeddings that counts as rounding; bfloat16 causes about 1e-3."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """A learned matrix, and data that identifies the two models it was learned for.

    Attributes:
        matrix: ``(calibrator width, target width)`` in float32; projects row vectors by
            ``vector @ matrix``.
        config: The settings of :func:`align`.
        report: Retrieval on held-out tokens and other results of :func:`align`, JSON-ready.
        fingerprint: SHA-256 of the target's embedding and vocabulary.
        calibrator_rows: ``(sampled, calibrator width)``, sampled rows of the calibrator's
            embedding.
        target_rows: ``(sampled, target width)``, the target's rows for the same tokens.
        calibrator_ids: Token ids of ``calibrator_rows``.
        target_ids: Token ids of ``target_rows``.
        vocabularies: Fingerprints of the calibrator's and the target's vocabulary.
    """

    matrix: Tensor
    config: AlignmentConfig
    report: dict[str, Any]
    fingerprint: str
    calibrator_rows: Tensor
    target_rows: Tensor
    calibrator_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    vocabularies: tuple[str, str]

    def facts(self) -> dict[str, Any]:
        """Return the settings and the report, JSON-ready."""
        return {"config": self.config.to_dict(), **self.report}

    def digest(self) -> str:
        """Return 12 hexadecimal digits of the matrix's SHA-256."""
        return hashlib.sha256(self.matrix.numpy().tobytes()).hexdigest()[:12]

    def check_calibrator(self, calibrator: Calibrator) -> None:
        """Check that the alignment was learned for this calibrator.

        Raises:
            AlignmentError: The vocabulary, the width or the embeddings differ.
        """
        table = calibrator_embeddings(calibrator, self.config.embeddings)
        self._check(table, self.vocabularies[0], self.calibrator_ids, self.calibrator_rows)

    def check_target(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the alignment was learned for this target.

        Raises:
            AlignmentError: The vocabulary, the width or the embeddings differ.
        """
        table = model_embeddings(model, tokenizer, self.config.embeddings)
        self._check(table, self.vocabularies[1], self.target_ids, self.target_rows)

    def _check(
        self, table: EmbeddingTable, vocabulary: str, ids: tuple[int, ...], rows: Tensor
    ) -> None:
        kind, width = self.config.embeddings, table.weight.shape[1]
        remedy = "Learn it again for these two models, with `fusion-detox align` or align()"
        if table.tokens.fingerprint() != vocabulary:
            raise AlignmentError(
                f"the alignment was learned for a vocabulary other than that of {table.name}. "
                f"{remedy}"
            )
        if width != rows.shape[1]:
            raise AlignmentError(
                f"the alignment was learned for embeddings of width {rows.shape[1]}, but the "
                f"{kind} embeddings of {table.name} have width {width}. {remedy}"
            )
        if not all(0 <= id < len(table.weight) for id in ids):
            raise AlignmentError(
                f"the alignment names tokens that {table.name} does not have. {remedy}"
            )
        found = table.weight[torch.tensor(ids, device=table.weight.device)].float().cpu()
        error = float((found - rows).norm() / rows.norm())
        if not error <= _ROUNDING:
            raise AlignmentError(
                f"the alignment does not match the {kind} embeddings of {table.name} "
                f"(they differ by {error:.1%}): it is stale, or belongs to another model. {remedy}"
            )


def align(
    calibrator: Calibrator,
    target: PreTrainedModel | str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    config: AlignmentConfig | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    show_progress: bool = True,
) -> Alignment:
    """Learn a matrix that projects a calibrator's hidden states into a target's hidden space.

    Args:
        calibrator: The calibrator; its clean model's embeddings are used.
        target: A loaded model, or a folder or hub id. From files, only the embedding is read.
        tokenizer: The target's tokenizer; required with a loaded model.
        config: Settings; the closed form by default.
        revision: Branch, tag or commit of a hub model.
        local_files_only: Never contact the hub.
        show_progress: Whether to show a progress bar on standard error.

    Returns:
        The alignment. Save it with ``save_alignment``.

    Raises:
        AlignmentError: The models share fewer than two tokens, an embedding is missing, training
            diverged, or ``start="identity"`` is used with different widths.
        ConfigError: A loaded model is given without its tokenizer.
        ModelError: The target is not a causal language model, or its files are damaged.
        ModelNotFoundError: The target was not found.
        VocabularyError: The bytes of the target's tokens cannot be determined.
    """
    config = config or AlignmentConfig()
    if isinstance(target, (str, os.PathLike)):
        table = checkpoint_embeddings(
            target,
            config.embeddings,
            tokenizer=tokenizer,
            revision=revision,
            local_files_only=local_files_only,
        )
    elif tokenizer is None:
        raise ConfigError("a loaded target needs its tokenizer: use align(..., tokenizer=...)")
    else:
        table = model_embeddings(target, tokenizer, config.embeddings)
    source = calibrator_embeddings(calibrator, config.embeddings)
    return align_tables(source, table, config, show_progress=show_progress)


def align_tables(
    source: EmbeddingTable,
    target: EmbeddingTable,
    config: AlignmentConfig,
    *,
    show_progress: bool = False,
) -> Alignment:
    """Learn an alignment from the embeddings of a calibrator and a target; see :func:`align`."""
    source_ids, target_ids = zip(*common_tokens(source, target), strict=True)
    source_rows, target_rows = _rows(source, source_ids), _rows(target, target_ids)
    count = len(source_ids)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
    held_out, rest = order.tensor_split([max(1, round(config.held_out * count))])
    with torch.inference_mode(False):
        matrix = learn_matrix(
            source_rows[rest], target_rows[rest], config, show_progress=show_progress
        )
    projected = (source_rows - source_rows.mean(0)) @ matrix
    centred = target_rows - target_rows.mean(0)
    sampled = rest[:_SAMPLED_ROWS].tolist()
    return Alignment(
        matrix=matrix,
        config=config,
        report={
            "calibrator": source.name,
            "target": target.name,
            "widths": list(matrix.shape),
            "common_tokens": count,
            "calibrator_tokens": len(source.weight),
            "target_tokens": len(target.tokens.token_bytes),
            "held_out_tokens": len(held_out),
            "to_target": retrieval(projected[held_out], centred, held_out),
            "to_calibrator": retrieval(centred[held_out], projected, held_out),
            "chance": {f"at_{k}": round(min(1.0, k / count), 6) for k in (1, 10)},
        },
        fingerprint=target.fingerprint(config.embeddings),
        calibrator_rows=source_rows[sampled],
        target_rows=target_rows[sampled],
        calibrator_ids=tuple(source_ids[i] for i in sampled),
        target_ids=tuple(target_ids[i] for i in sampled),
        vocabularies=(source.tokens.fingerprint(), target.tokens.fingerprint()),
    )


def common_tokens(source: EmbeddingTable, target: EmbeddingTable) -> list[tuple[int, int]]:
    """Return the id pairs of tokens with the same bytes, in the calibrator's order.

    Raises:
        AlignmentError: There are fewer than two.
    """
    source_ids, target_ids = _ids_by_bytes(source), _ids_by_bytes(target)
    pairs = sorted((id, target_ids[key]) for key, id in source_ids.items() if key in target_ids)
    if len(pairs) < 2:
        raise AlignmentError(
            f"{source.name} and {target.name} have {len(pairs)} tokens in common, but an alignment "
            "needs at least 2: use a calibrator for the target's language, or the "
            "contrast rule, which needs no alignment"
        )
    return pairs


def _ids_by_bytes(table: EmbeddingTable) -> dict[bytes, int]:
    """Return one id that has a row in the embedding for each distinct byte sequence."""
    tokens = table.tokens
    found: dict[bytes, int] = {}
    for id, key in enumerate(tokens.token_bytes[: len(table.weight)]):
        # A tokenizer prefers a normal token to its <0xNN> twin.
        if key and (key not in found or found[key] in tokens.byte_ids):
            found[key] = id
    return found


def _rows(table: EmbeddingTable, ids: Sequence[int]) -> Tensor:
    rows = table.weight[torch.tensor(ids, device=table.weight.device)].to("cpu", torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise AlignmentError(
            f"the embeddings of {table.name} hold values that are not finite, so its files are "
            "damaged: copy or download them again"
        )
    return rows


def learn_matrix(
    source: Tensor, target: Tensor, config: AlignmentConfig, *, show_progress: bool
) -> Tensor:
    """Learn the matrix from the embeddings of tokens that both models have.

    Args:
        source: ``(tokens, calibrator width)`` in float32.
        target: ``(tokens, target width)`` in float32, embeddings of the same tokens.
        config: Settings.
        show_progress: Whether to show a progress bar on standard error.

    Returns:
        ``(calibrator width, target width)`` in float32.

    Raises:
        AlignmentError: Training diverged, or ``start="identity"`` is used with different widths.
    """
    generator = torch.Generator().manual_seed(config.seed)
    rows, columns = source.shape[1], target.shape[1]
    if config.start == "procrustes":
        matrix = _procrustes(source, target)
    elif config.start == "random":
        matrix = torch.randn(rows, columns, generator=generator) / math.sqrt(rows)
    elif rows == columns:
        matrix = torch.eye(rows)
    else:
        raise AlignmentError(
            f"start='identity' needs equal widths, but the calibrator's embeddings have width "
            f"{rows} and the target's have width {columns}: use start='procrustes'"
        )
    if config.epochs:
        return train_infonce(matrix, source, target, config, generator, show_progress=show_progress)
    return matrix


def _procrustes(source: Tensor, target: Tensor) -> Tensor:
    """The orthogonal matrix that best maps ``source`` to ``target`` (Schönemann 1966), scaled."""
    # All tokens share the mean, so it does not tell them apart.
    source, target = source - source.mean(0), target - target.mean(0)
    left, _, right = torch.linalg.svd(source.t() @ target, full_matrices=False)
    # Scaled so that projected vectors are as long as the target's.
    scale = target.square().sum().sqrt() / source.square().sum().sqrt().clamp_min(1e-12)
    orthogonal: Tensor = left @ right
    return orthogonal * scale


def retrieval(queries: Tensor, candidates: Tensor, answers: Tensor) -> dict[str, float]:
    """Measure how often a query's own candidate ranks first, or in the top ten, by cosine.

    Args:
        queries: ``(queries, width)``.
        candidates: ``(candidates, width)``.
        answers: ``(queries,)``, index of each query's own candidate.

    Returns:
        ``"at_1"`` and ``"at_10"``, in 0..1.
    """
    directions = torch.nn.functional.normalize(candidates, dim=-1).t()
    ranks = []
    for start in range(0, len(queries), _QUERIES):
        part = slice(start, start + _QUERIES)
        similarity = queries[part] @ directions  # a query's length does not change its ranking
        own = similarity.gather(1, answers[part, None])
        # Ties and NaN count as misses, so a collapsed matrix retrieves nothing.
        ranks.append((~(similarity < own)).sum(1) - 1)
    rank = torch.cat(ranks)
    return {f"at_{k}": round(float((rank < k).float().mean()), 6) for k in (1, 10)}
