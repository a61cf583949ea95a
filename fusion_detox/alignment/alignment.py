"""``align`` and ``Alignment``: a calibrator's hidden states in the space of a target's.

The two models share tokens, found by their bytes. A matrix is learned that carries the
calibrator's embeddings of them to the target's (arXiv 2506.01266, with ``AlignmentConfig.paper()``)
or that lets both output layers say the same (the default). The aligned rules then carry over the
calibrator's last hidden state of each step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusion_detox.alignment.config import AlignmentConfig
from fusion_detox.alignment.embeddings import EmbeddingTable, of_calibrator, of_files, of_model
from fusion_detox.alignment.solve import learn, retrieval
from fusion_detox.errors import AlignmentError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fusion_detox.calibrator.calibrator import Calibrator
    from fusion_detox.vocabulary.token_table import TokenTable

_SAMPLED = 64
_SAME = 3e-3
"""Relative difference of embeddings that is rounding: bfloat16 makes some 1e-3."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """A learned matrix, and what it belongs to.

    Attributes:
        matrix: ``(calibrator width, target width)`` in float32; a row vector is multiplied with
            it from the left.
        config: How it was learned.
        report: Retrieval on held-out tokens and what else ``align`` tells, JSON-ready.
        fingerprint: SHA-256 of the target's embedding and vocabulary.
        calibrator_rows: ``(sampled, calibrator width)``, rows of the calibrator's embedding.
        target_rows: ``(sampled, target width)``, likewise of the target's.
        calibrator_ids: Their tokens.
        target_ids: Likewise.
        vocabularies: Fingerprints of the calibrator's and of the target's.
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
        """What a reader of a report should know of it, JSON-ready."""
        return {"config": self.config.to_dict(), **self.report}

    def digest(self) -> str:
        """12 hex digits over the matrix."""
        return hashlib.sha256(self.matrix.numpy().tobytes()).hexdigest()[:12]

    def check_calibrator(self, calibrator: Calibrator) -> None:
        """Refuse a calibrator that it was not learned for.

        Raises:
            AlignmentError: Vocabulary, width or embeddings are others.
        """
        table = of_calibrator(calibrator, self.config.embeddings)
        self._check(table, 0, self.calibrator_ids, self.calibrator_rows)

    def check_target(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a target that it was not learned for.

        Raises:
            AlignmentError: Vocabulary, width or embeddings are others.
        """
        table = of_model(model, tokenizer, self.config.embeddings)
        self._check(table, 1, self.target_ids, self.target_rows)

    def _check(self, table: EmbeddingTable, side: int, ids: tuple[int, ...], rows: Tensor) -> None:
        mend = "Align the two that are used now, with `fusion-detox align` or fusion_detox.align()"
        if table.tokens.fingerprint() != self.vocabularies[side]:
            raise AlignmentError(
                f"the alignment belongs to a model with another vocabulary than {table.name}. "
                f"{mend}"
            )
        if table.weight.shape[1] != rows.shape[1]:
            raise AlignmentError(
                f"the alignment is for vectors of {rows.shape[1]} entries, but the "
                f"{self.config.embeddings} embeddings of {table.name} have "
                f"{table.weight.shape[1]}. {mend}"
            )
        found = table.weight[torch.tensor(ids, device=table.weight.device)].float().cpu()
        error = float((found - rows).square().sum().sqrt() / rows.square().sum().sqrt())
        if not error <= _SAME:
            raise AlignmentError(
                f"the alignment was learned for other {self.config.embeddings} embeddings than "
                f"those of {table.name} (they differ by {error:.1%}): it is stale, or of another "
                f"model. {mend}"
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
    """Learns how to carry a calibrator's hidden states over to a target.

    Args:
        calibrator: Whose hidden states.
        target: A folder or hub id, of which the embedding alone is read, or a loaded model.
        tokenizer: The target's; needed beside a loaded model.
        config: How; a closed form by default.
        revision: Branch, tag or commit of a hub model.
        local_files_only: Never contact the hub.
        show_progress: Whether to show a bar on standard error.

    Returns:
        The alignment; store it with ``save_alignment``.

    Raises:
        AlignmentError: The two share no tokens, an embedding is missing, or the widths of its
            input and output embeddings differ.
        ConfigError: A loaded model is given without its tokenizer.
        ModelError: The target is no causal language model, or its files are damaged.
        ModelNotFoundError: There is no such target.
        VocabularyError: The bytes of its tokens cannot be found out.
    """
    config = config or AlignmentConfig()
    if isinstance(target, (str, os.PathLike)):
        there = of_files(
            target,
            config.embeddings,
            tokenizer=tokenizer,
            revision=revision,
            local_files_only=local_files_only,
        )
    elif tokenizer is None:
        raise ConfigError("a loaded target needs its tokenizer beside it: align(..., tokenizer=…)")
    else:
        there = of_model(target, tokenizer, config.embeddings)
    here = of_calibrator(calibrator, config.embeddings)
    return align_tables(here, there, config, show_progress=show_progress)


def align_tables(
    here: EmbeddingTable,
    there: EmbeddingTable,
    config: AlignmentConfig,
    *,
    show_progress: bool = False,
) -> Alignment:
    """The same for two embeddings that are at hand."""
    pairs = common_tokens(here, there)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(config.seed))
    held = max(1, round(config.held_out * len(pairs)))
    own, target = _rows(here, [i for i, _ in pairs]), _rows(there, [i for _, i in pairs])
    with torch.inference_mode(False):
        matrix = learn(own[order[held:]], target[order[held:]], config, show_progress=show_progress)
    asked = order[:held]
    mean_own, mean_target = own.mean(0), target.mean(0)
    carried = (own - mean_own) @ matrix
    centred = target - mean_target
    forth = retrieval(carried[asked], centred, asked)
    back = retrieval(centred[asked], carried, asked)
    sampled = order[held:][:_SAMPLED].tolist()
    return Alignment(
        matrix=matrix,
        config=config,
        report={
            "calibrator": here.name,
            "target": there.name,
            "widths": list(matrix.shape),
            "common_tokens": len(pairs),
            "calibrator_tokens": len(here.weight),
            "target_tokens": len(there.tokens.token_bytes),
            "held_out_tokens": held,
            "to_target": forth,
            "to_calibrator": back,
            "chance": {f"at_{k}": round(min(1.0, k / len(pairs)), 6) for k in (1, 10)},
        },
        fingerprint=there.fingerprint(config.embeddings),
        calibrator_rows=own[sampled],
        target_rows=target[sampled],
        calibrator_ids=tuple(pairs[i][0] for i in sampled),
        target_ids=tuple(pairs[i][1] for i in sampled),
        vocabularies=(here.tokens.fingerprint(), there.tokens.fingerprint()),
    )


def common_tokens(here: EmbeddingTable, there: EmbeddingTable) -> list[tuple[int, int]]:
    """The ids of tokens with the same bytes, in the calibrator's order.

    Raises:
        AlignmentError: There are fewer than two.
    """
    known = _by_bytes(there.tokens, len(there.weight))
    pairs = [
        (id, known[piece])
        for piece, id in sorted(
            _by_bytes(here.tokens, len(here.weight)).items(), key=lambda item: item[1]
        )
        if piece in known
    ]
    if len(pairs) < 2:
        raise AlignmentError(
            f"{here.name} and {there.name} have {len(pairs)} tokens in common, and an alignment "
            "is learned from common tokens: use a calibrator whose tokenizer spells the same "
            "language, or the contrast rule, which needs none"
        )
    return pairs


def _by_bytes(tokens: TokenTable, rows: int) -> dict[bytes, int]:
    """One id for each spelling that the embedding has a row for."""
    found: dict[bytes, int] = {}
    for id, piece in enumerate(tokens.token_bytes[:rows]):
        # Of a normal piece and its <0xNN> twin the tokenizer uses the former.
        if piece and (piece not in found or found[piece] in tokens.byte_ids):
            found[piece] = id
    return found


def _rows(table: EmbeddingTable, ids: list[int]) -> Tensor:
    rows = table.weight[torch.tensor(ids, device=table.weight.device)]
    found = rows.to("cpu", torch.float32)
    if not bool(torch.isfinite(found).all()):
        raise AlignmentError(
            f"the embeddings of {table.name} hold values that are not finite numbers; its files "
            "are damaged"
        )
    return found
