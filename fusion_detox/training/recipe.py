"""``train_calibrator``: from text to a calibrator folder, in stages that survive a kill."""

from __future__ import annotations

import logging
import random
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusion_detox.calibrator import Calibrator
from fusion_detox.config import FusionConfig
from fusion_detox.errors import DataError, MissingExtraError, TrainingError
from fusion_detox.tokens import TokenTable
from fusion_detox.training.blocks import Blocks, Streams, pack, paired_streams, tokenize
from fusion_detox.training.corpus import Columns, Condition, Document, file_hashes, read_documents
from fusion_detox.training.settings import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fusion_detox.training.run import Splits
    from fusion_detox.training.stage import HeldOut

logger = logging.getLogger(__name__)
Sources = Sequence[str | Path]


def train_calibrator(
    output: str | Path,
    *,
    clean: Sources = (),
    general: Sources = (),
    reference_data: Sources = (),
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    columns: Columns | None = None,
    clean_where: Sequence[str] = (),
    config: TrainingConfig | None = None,
    fusion: FusionConfig | None = None,
    name: str | None = None,
    notes: dict[str, Any] | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    command: str | None = None,
) -> Calibrator:
    """Trains the clean model and its reference, and saves them as a calibrator.

    From scratch, a tokenizer and a base model are trained on ``general`` first. Then the model
    forks: the reference goes on with ``general`` (or ``reference_data``), the clean model with
    ``clean``, for the same number of steps, from the same weights and with the same text in the
    same places wherever both corpora hold it. What then differs between them is what non-toxic
    training changed (arXiv 2506.01266 trains the clean model alone; DExperts, arXiv 2105.03023,
    takes a difference of two).

    A killed run goes on where it was when it is started again with the same arguments. Under
    ``torchrun`` or ``accelerate launch`` each step's blocks are spread over the processes.

    Args:
        output: The calibrator folder to write; the work in progress stays beside it until then.
        clean: Non-toxic text; may be left out where ``clean_where`` picks it from ``general``.
        general: Text of all kinds.
        reference_data: Trains the reference on this instead, for example on toxic text.
        base: A causal language model by path or hub id to start from, in place of scratch.
        tokenizer: A tokenizer by path or hub id for a model from scratch, such as the target's
            own; one is trained by default.
        columns: Which fields hold text, prompts and completions.
        clean_where: Conditions like ``"label=neutral"`` on the rows of the clean text.
        config: Sizes, steps and seed.
        fusion: Recommended fusion settings, written into the card.
        name: Name on the card; the folder's name by default.
        notes: Facts for the record and the card, such as ``{"language": "en", "data": [...]}``.
        overwrite: Replaces an existing calibrator and forgets unfinished work of other settings.
        show_progress: Whether to show progress bars on standard error.
        command: The command line that was run, for the record.

    Raises:
        DataError: The text is empty, broken or too little.
        TrainingError: The settings do not fit each other or unfinished work at ``output``.
        MissingExtraError: ``accelerate`` is not installed.
        KeyboardInterrupt: Interrupted; the work so far is kept for the next start.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error
    from fusion_detox.training.run import Run, claim

    config, columns = config or TrainingConfig(), columns or Columns()
    output = Path(output).expanduser()
    work = output.with_name(output.name + ".training")
    _check_request(clean, general, base, tokenizer, clean_where)
    if output.exists() and not overwrite:
        raise TrainingError(
            f"{output} exists already: choose another folder, or replace it with --overwrite"
        )

    state = PartialState(cpu=config.device == "cpu")
    if config.batch_size % state.num_processes:
        raise TrainingError(
            f"batch_size {config.batch_size} cannot be spread evenly over "
            f"{state.num_processes} processes"
        )
    run = Run(
        config, base, tokenizer, work, state.num_processes, state.is_main_process, show_progress
    )
    conditions = [Condition.parse(text) for text in clean_where]
    texts = {
        "general": read_documents(general, columns) if general else [],
        "clean": read_documents(clean or general, columns, conditions),
        "reference_data": read_documents(reference_data, columns) if reference_data else [],
    }
    _check_texts(texts)
    fingerprint = run.fingerprint(texts)
    with state.main_process_first():
        if state.is_main_process:
            claim(work, fingerprint, overwrite)
    splits = {label: _split(documents, config.held_out) for label, documents in texts.items()}
    with state.main_process_first():
        start, words = run.start(splits)
    byte_lengths = _byte_lengths(words)
    bos_id = _bos_id(words)
    held_out = {
        label: _held_out(words, bos_id, held, config.context_length, byte_lengths)
        for label, (_, held) in splits.items()
        if held
    }
    began = time.time()
    if base is None:
        start = run.stage(
            "base",
            start,
            lambda: _base_blocks(words, bos_id, splits, config),
            held_out,
            steps=config.base_steps,
            fork=False,
        )
    reference_label = "reference_data" if reference_data else "general"
    streams = _fork_streams(words, bos_id, splits, reference_label, config)
    state.wait_for_everyone()
    reference = start
    if streams.reference is not streams.clean:
        reference = run.stage("reference", start, lambda: streams.reference, held_out, fork=True)
    else:
        logger.warning(
            "no general text given: the base model itself is the reference, so the difference "
            "also holds what the domain of the clean text changed"
        )
    model = run.stage("clean", start, lambda: streams.clean, held_out, fork=True)

    record = {
        "command": command or " ".join(sys.argv),
        "name": name or output.name,
        "base_model": None if base is None else str(base),
        "seed": config.seed,
        "settings": config.to_dict(),
        "data_files": {
            label: file_hashes(sources)
            for label, sources in (
                ("general", general),
                ("clean", clean),
                ("reference_data", reference_data),
            )
            if sources
        },
        "conditions": list(clean_where),
        "documents": {label: len(documents) for label, documents in texts.items()},
        "fingerprint": fingerprint,
        "bits_per_byte": {
            label: {
                "clean": round(text.bits_per_byte(model), 4),
                "reference": round(text.bits_per_byte(reference), 4),
            }
            for label, text in held_out.items()
        },
        "curves": run.curves(),
        "processes": state.num_processes,
        "seconds": round(time.time() - began),
        "versions": _versions(),
        **(notes or {}),
    }
    calibrator = Calibrator(
        model,
        reference,
        words,
        config=fusion,
        context_length=config.context_length,
        record=record,
        name=name or output.name,
    )
    if state.is_main_process:
        calibrator.save_pretrained(output, dtype=getattr(torch, config.save_dtype))
        shutil.rmtree(work, ignore_errors=True)
    state.wait_for_everyone()
    return calibrator


def _check_request(
    clean: Sources, general: Sources, base: Any, tokenizer: Any, where: Sequence[str]
) -> None:
    if not clean and not (general and where):
        raise TrainingError(
            "there is no clean text: give some, or general text and a condition that picks the "
            "clean part of it, such as toxic=false"
        )
    if base is None and not general:
        raise TrainingError("without a base model, general text is needed to train one from")
    if base is not None and tokenizer is not None:
        raise TrainingError("a base model brings its own tokenizer: give one or the other")


def _check_texts(texts: dict[str, list[Document]]) -> None:
    general = {d.key for d in texts["general"]}
    clean = {d.key for d in texts["clean"]}
    if general and general <= clean and not texts["reference_data"]:
        raise DataError(
            f"all {len(general)} general documents are clean documents too, so the two models "
            "would learn the same: general text must also hold what is to be held back"
        )


def _split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, by content, so that a text is never on both sides."""
    border = round(share * 16**6)
    held = [d for d in documents if int(d.key[:6], 16) < border]
    rest = [d for d in documents if int(d.key[:6], 16) >= border]
    return (rest, held[:1500]) if rest else (documents, [])


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    raise TrainingError("the tokenizer has neither a BOS nor an EOS token to begin a text with")


def _byte_lengths(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    pieces = TokenTable.from_tokenizer(tokenizer).pieces
    return [0 if piece is None else len(piece) for piece in pieces]


def _held_out(
    tokenizer: PreTrainedTokenizerBase,
    bos_id: int,
    documents: list[Document],
    length: int,
    byte_lengths: list[int],
) -> HeldOut:
    from fusion_detox.training.stage import HeldOut

    blocks = pack(tokenize(tokenizer, documents), bos_id, length)
    keep = min(len(blocks), 200)
    return HeldOut(blocks.take(range(keep)), byte_lengths)


def _base_blocks(
    tokenizer: PreTrainedTokenizerBase, bos_id: int, splits: Splits, config: TrainingConfig
) -> Blocks:
    documents = list({d.key: d for d in splits["general"][0]}.values())
    random.Random(config.seed).shuffle(documents)
    wanted = config.base_steps * config.batch_size
    blocks = pack(tokenize(tokenizer, documents), bos_id, config.context_length)
    if len(blocks) * 20 < wanted:
        logger.warning("the general text is repeated %.0f times", wanted / len(blocks))
    order = list(range(len(blocks)))
    random.Random(config.seed).shuffle(order)
    return blocks.take([order[i % len(order)] for i in range(wanted)])


def _fork_streams(
    tokenizer: PreTrainedTokenizerBase,
    bos_id: int,
    splits: Splits,
    label: str,
    config: TrainingConfig,
) -> Streams:
    reference, clean = splits[label][0], splits["clean"][0]
    streams = paired_streams(
        tokenizer,
        bos_id,
        reference or clean,
        clean,
        blocks=config.fork_steps * config.batch_size,
        length=config.context_length,
        contrast_share=config.contrast_share,
        seed=config.seed + 1,
    )
    return streams if reference else Streams(streams.clean, streams.clean)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("fusion-detox", "torch", "transformers", "tokenizers", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
