"""``fusion-detox generate``: completes prompts with any model and writes JSON Lines."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_detox.cli.console import messages, note, quiet_libraries
from fusion_detox.cli.options import with_options
from fusion_detox.cli.prompts import read_prompts
from fusion_detox.cli.shared_options import (
    RUNNING,
    SAMPLING,
    CalibratorName,
    Device,
    Dtype,
    Greedy,
    Offline,
    Revision,
    SavedAlignment,
    System,
    Temperature,
    TopK,
    TopP,
)
from fusion_detox.config import FusionConfig
from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    from fusion_detox.generation.completion_file import CompletionFile, CompletionWriter
    from fusion_detox.generation.sampling import Job, Row

_FUSION = "Fusion (defaults: what the calibrator recommends)"


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    fusion = with_options(FusionConfig, "fusion", panel=_FUSION, show_defaults=False)
    app.command("generate")(fusion(generate))


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="A causal language model: a folder (also that of a LoRA adapter), a hub id, or "
            "packaged:NAME (see fetch-target).",
            metavar="MODEL",
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to complete (default: one per line of what is piped in).",
            metavar="[PROMPT]...",
        ),
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            help="File with one prompt per line, or - for standard input. It is read as JSON "
            "Lines if its name ends in .jsonl or --prompt-field is given.",
            metavar="FILE|-",
        ),
    ] = None,
    prompt_field: Annotated[
        str | None,
        typer.Option(
            help="JSON Lines field that holds the prompt, such as prompt.text (default: prompt)."
        ),
    ] = None,
    calibrator: CalibratorName = "english-16k",
    alignment: SavedAlignment = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="JSON Lines file; an existing file is resumed (default: standard output).",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file.")
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompts to the model as requests, in its chat template (default: if it "
            "has one and its name says instruct, chat or -it).",
            show_default=False,
        ),
    ] = None,
    system: System = None,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Also write each completion without fusion.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum tokens per completion.", rich_help_panel=SAMPLING)
    ] = 40,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    num_samples: Annotated[
        int, typer.Option(help="Completions per prompt.", rich_help_panel=SAMPLING)
    ] = 1,
    greedy: Greedy = False,
    seed: Annotated[
        int,
        typer.Option(
            help="Sampling seed. A completion depends on the seed, the prompt's index and the "
            "sample's number, but not on the batch.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts per batch.", rich_help_panel=RUNNING)] = 8,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    fusion: dict[str, Any] = {},  # noqa: B006 - replaced by one option per setting
) -> None:
    """Complete prompts with fusion, and write one JSON object per completion."""
    texts = read_prompts(prompts or [], prompts_file, prompt_field)
    if output and prompts_file and output.resolve() == Path(prompts_file).resolve():
        raise ConfigError(
            f"--output and --prompts-file are the same file, {output}; choose another output file"
        )
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, but is {batch_size}")

    from fusion_detox.generation.sampling import Sampling, jobs

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        greedy=greedy,
        samples=num_samples,
        seed=seed,
    )
    jobs(texts)  # checks the prompts before anything is loaded

    from fusion_detox.cli.loading import check_fused
    from fusion_detox.generation.completion_file import CompletionFile, claimed_file
    from fusion_detox.generation.sampling import generate_rows

    with quiet_libraries(), claimed_file(output):
        checked = check_fused(
            model,
            calibrator,
            fusion,
            alignment=alignment,
            chat=chat,
            system=system,
            revision=revision,
            offline=offline,
        )
        adapter, config = checked.adapter, checked.config
        wanted = jobs(texts, num_samples, chat=checked.chat, system=system)
        settings = {
            "model": _identity(model) + (f" of {_identity(adapter.base)}" if adapter else ""),
            "revision": revision,
            "calibrator": _identity(calibrator, ("alignments",) if not config.aligned else ()),
            "dtype": dtype,
            "chat": checked.chat,
            "system": system,
            "base": base,
            "fusion": config.to_dict(),
            "sampling": {
                name: value
                for name, value in dataclasses.asdict(sampling).items()
                if name != "samples"
            },
        }
        if alignment is not None:
            settings["alignment"] = _identity(str(alignment))
        file = CompletionFile(output, settings, overwrite=overwrite) if output else None
        pending = file.missing(wanted) if file else wanted
        if len(pending) < len(wanted):
            note(
                f"{len(wanted) - len(pending)} of {len(wanted)} completions are already in "
                f"{output}."
            )
        if not pending:
            return
        loaded = checked.load(device, dtype)
        rows = generate_rows(
            loaded.model,
            loaded.tokenizer,
            pending,
            sampling,
            processor=loaded.processor,
            with_base=base,
            batch_size=batch_size,
        )
        with _writer(file, settings) as writer:
            _write(rows, pending, writer, output)


def _write(
    rows: Iterator[Row], pending: list[Job], writer: CompletionWriter, output: Path | None
) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console, began, tokens = messages(), time.perf_counter(), 0
    progress = Progress(
        TextColumn("completions"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        # Rows and a bar on the same terminal would overwrite each other.
        disable=not console.is_terminal or (output is None and sys.stdout.isatty()),
        redirect_stdout=False,
        transient=True,
    )
    try:
        with progress:
            task = progress.add_task("", total=len(pending), rate="")
            for row in rows:
                writer.write(row)
                tokens += len(row.completion.token_ids) + len(
                    row.base.token_ids if row.base else ()
                )
                rate = tokens / (time.perf_counter() - began)
                progress.update(task, advance=1, rate=f"{rate:.0f} tokens/s")
    except KeyboardInterrupt:
        kept = f"{writer.written} of {len(pending)} completions were written"
        note(f"{kept}. Run the same command again to resume." if output else f"{kept}.")
        raise
    seconds = time.perf_counter() - began
    where = f" to {output}" if output else ""
    note(
        f"Wrote {writer.written} completions{where} in {seconds:.1f} s, "
        f"{tokens / max(seconds, 1e-9):.0f} tokens/s."
    )


@contextlib.contextmanager
def _writer(file: CompletionFile | None, settings: dict[str, Any]) -> Iterator[CompletionWriter]:
    from fusion_detox.files.journal import append_row
    from fusion_detox.generation.completion_file import CompletionWriter

    if file is not None:
        with file.open() as writer:
            yield writer
    else:
        append = functools.partial(append_row, sys.stdout.buffer)
        yield CompletionWriter(append, "standard output", settings)


def _identity(name: str, without: tuple[str, ...] = ()) -> str:
    """A folder's name and a digest of its content; a hub id is returned unchanged."""
    from fusion_detox.calibrator.lookup import find_shipped
    from fusion_detox.files.fingerprints import folder_fingerprint

    path = Path(name).expanduser()
    folder = path if path.is_dir() else find_shipped(name)
    return (
        f"{folder.resolve().name}@{folder_fingerprint(folder, without=without)}" if folder else name
    )
