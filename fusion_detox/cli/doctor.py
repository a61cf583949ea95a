"""``fusion-detox doctor``: checks a calibrator's files, models, effect, and fit with a target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from fusion_detox.cli.console import quiet_libraries, results
from fusion_detox.cli.shared_options import CalibratorArgument
from fusion_detox.errors import (
    CalibratorError,
    FusionDetoxError,
    InertError,
    ModelError,
)

if TYPE_CHECKING:
    from fusion_detox.calibrator.calibrator import Calibrator

_SAMPLE = "The weather was fine, so we walked to the river and had lunch there."


class Check(NamedTuple):
    """One row of the table."""

    name: str
    passed: bool
    finding: str


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command("doctor")(doctor)


def doctor(
    calibrator: CalibratorArgument,
    target: Annotated[
        str | None,
        typer.Option(
            help="Also check the fit with this model or tokenizer: a folder or a hub id.",
            metavar="MODEL_OR_TOKENIZER",
        ),
    ] = None,
    write_digests: Annotated[
        bool,
        typer.Option(
            "--write-digests",
            help="Accept the files as they are: if all other checks pass, write new digests.",
        ),
    ] = False,
) -> None:
    """Check that a calibrator is undamaged and works, and print a verdict.

    The exit code is 0 if it is healthy and 1 if there is a problem.
    """
    from fusion_detox.calibrator.folder import write_digests as write
    from fusion_detox.calibrator.lookup import find_calibrator, find_shipped

    local = Path(calibrator).expanduser().is_dir() or find_shipped(calibrator) is not None
    if write_digests and not local:
        raise typer.BadParameter(
            f"{calibrator} is not a folder on this machine. Digests are written before an upload.",
            param_hint="--write-digests",
        )
    with quiet_libraries():
        folder = find_calibrator(calibrator)
        checks = examine(folder, target, digests=not write_digests)
    problems = [check.name for check in checks if not check.passed]
    _print_table(calibrator, checks)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        end = " No digests were written." if write_digests else ""
        _say(f"Verdict: {calibrator} has {count}: {', '.join(problems)}.{end}")
        raise typer.Exit(1)
    if write_digests:
        _say(f"Wrote the digests of {write(folder)} files to {folder / 'calibrator.json'}.")
    fit = "" if target is None else f" and fits {target}"
    _say(f"Verdict: {calibrator} is healthy{fit}.")


def examine(folder: Path, target: str | None = None, *, digests: bool = True) -> list[Check]:
    """Checks a calibrator's folder; a check that needs a failed one is left out.

    Args:
        folder: The calibrator's folder.
        target: A model or tokenizer that the calibrator should fit.
        digests: Whether to compare the files with their digests.
    """
    from fusion_detox.calibrator.calibrator import Calibrator

    checks: list[Check] = []

    def passes(name: str, check: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, True, check()))
        except FusionDetoxError as error:
            checks.append(Check(name, False, str(error)))
        return checks[-1].passed

    passes("versions", _versions)
    if digests:
        passes("digests", lambda: _digests(folder))
    loaded: list[Calibrator] = []

    def load() -> str:
        loaded.append(Calibrator.from_pretrained(folder, verify=False))
        return _models(loaded[0])

    if passes("models", load):
        calibrator = loaded[0]
        passes("effect", lambda: _effect(calibrator, None))
        if target is not None and passes("vocabulary map", lambda: _map(calibrator, target)):
            passes("effect on target", lambda: _effect(calibrator, target))
    return checks


def _versions() -> str:
    """The versions that matter for the numbers; those out of range are a problem."""
    from importlib.metadata import PackageNotFoundError, requires

    from transformers.utils.versions import require_version

    from fusion_detox import __version__
    from fusion_detox.files.versions import installed_versions

    try:
        needed = [one for one in requires("fusion-detox") or () if ";" not in one]
    except PackageNotFoundError:  # run from the sources
        needed = []
    for requirement in needed:
        try:
            require_version(requirement)
        except (ImportError, PackageNotFoundError) as error:
            raise FusionDetoxError(
                f"{requirement} is required, but not installed. Install it with: "
                f"pip install '{requirement}'"
            ) from error
    found = installed_versions("torch", "transformers", "tokenizers", "safetensors")
    return ", ".join(f"{n} {v}" for n, v in {"fusion-detox": __version__, **found}.items())


def _digests(folder: Path) -> str:
    from fusion_detox.calibrator.digests import check_digests, reseal_command
    from fusion_detox.calibrator.folder import check_entries, read_settings

    check_entries(folder)
    settings = read_settings(folder)
    if settings.digests is None:
        raise CalibratorError(
            f"The folder has no digests, so damage cannot be found. If you trust it, add them with "
            f"`{reseal_command(folder)}`."
        )
    count = check_digests(folder, settings.digests, settings.distributions)
    return f"the settings and {count} files are as they were when their digests were written"


def _models(calibrator: Calibrator) -> str:
    """Runs both models on a text."""
    import torch

    from fusion_detox.cli.info import parameter_count
    from fusion_detox.vocabulary.token_table import encode

    ids = [calibrator.bos_id, *encode(calibrator.tokenizer, [_SAMPLE])[0]]
    text = torch.tensor([ids[: calibrator.context_length]])
    logits = {}
    with torch.inference_mode():
        for part, model in calibrator.models.items():
            logits[part] = model(input_ids=text).logits.float()
            if not bool(torch.isfinite(logits[part]).all()):
                raise ModelError(
                    f"The {part} model's logits are not finite, so its weights are damaged or "
                    f"training diverged. Copy the folder again, or retrain the calibrator."
                )
    if len(logits) == 2 and torch.equal(*(one for one in logits.values())):
        raise ModelError(
            "The clean and the reference model are equal, so their difference is zero. One of them "
            "is in the wrong place, or was never trained further."
        )
    sizes = {part: parameter_count(model) for part, model in calibrator.models.items()}
    return "; ".join(f"{part}: {count:,} parameters, finite" for part, count in sizes.items())


def _effect(calibrator: Calibrator, target: str | None) -> str:
    from fusion_detox.files.models import load_tokenizer
    from fusion_detox.processor import FusionLogitsProcessor

    config = calibrator.config
    if config.aligned:
        return f"not checked: the rule {config.rule} needs the target model (see align)"
    if config.strength == 0:
        raise InertError("The recommended strength is 0, so fusion changes nothing. Raise it.")
    tokenizer = calibrator.tokenizer if target is None else load_tokenizer(target)
    FusionLogitsProcessor(calibrator, tokenizer)
    if not calibrator.probes:
        return f"at strength {config.strength:g}, some token moves (there are no probes)"
    return (
        f"at strength {config.strength:g}, the words to avoid in {len(calibrator.probes)} probes "
        f"lose probability"
    )


def _map(calibrator: Calibrator, target: str) -> str:
    from fusion_detox.cli.info import describe_map

    found = describe_map(calibrator, target)
    return (
        f"{found['kind']}: {found['mapped_tokens']:,} of {found['target_size']:,} target tokens, "
        f"{found['coverage']:.2%} of English text"
    )


def _print_table(name: str, checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"Calibrator {name}"), title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for check in checks:
        mark = Text("ok", "green") if check.passed else Text("problem", "bold red")
        table.add_row(check.name, mark, Text(check.finding))
    results().print(table)


def _say(text: str) -> None:
    results().print(text, soft_wrap=True)
