"""Writes the pages: the report of one run, and the comparison of several."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from fusion_detox.errors import ConfigError, DataError, DataFileError
from fusion_detox.evaluation.report import findings, numbers, peers, plots, reading, tables
from fusion_detox.evaluation.report.comparable import Difference, differences
from fusion_detox.evaluation.report.reading import FORMAT, Run, jsonable, line, run_labels
from fusion_detox.files.atomic import write_whole

_TEMPLATES = Path(__file__).parent / "templates"
# The fields of a run, and of each of its settings, that comparison.json contains.
_OF_RUN = [
    *("created", "target", "prompts", "sampling", "chat"),
    *("seeds", "threshold", "scorers", "versions"),
]
_OF_VARIANT = [
    *("name", "kind", "config", "calibrator", "toxicity", "against_base", "perplexity"),
    *("diversity", "similarity", "harmless", "groups", "refusal", "assistant", "cost"),
]


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write the report of a run: ``report.html``, and its plots as ``report.png``.

    The page is one file that loads nothing else. The same results give the same bytes. The report
    of a run that is still going on has no plots, because drawing them takes seconds.

    Args:
        results: A results document of format 1, as in ``results.json``; blocks may be missing.
        folder: Where to write both files; created if needed.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: The document has another format or no settings.
        MissingExtraError: matplotlib is not installed.
        DataFileError: A file cannot be written.
    """
    run = Run(results)
    plots.require_matplotlib()
    if results.get("unfinished"):
        return write(Path(folder) / "report.html", render("report.html", run=run, plots={}))
    panels = {
        "tradeoff": plots.tradeoff_panels(run),
        "peers": plots.peer_panels(run),
        "histograms": plots.histogram_panels(run),
        "groups": plots.group_panels(run),
        "types": plots.type_panels(run),
    }
    page = render("report.html", run=run, plots=panels)
    drawn = [panels[kind] for kind in ("tradeoff", "peers", "histograms", "groups")]
    write(Path(folder) / "report.png", plots.png(drawn, line(run.name, 70)))
    return write(Path(folder) / "report.html", page)


def write_comparison(runs: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write a page with several runs side by side, and a warning if they are not comparable.

    Args:
        runs: At least two results documents of format 1.
        path: The HTML file. The same numbers are written beside it, with the suffix ``.json``.

    Returns:
        ``path``.

    Raises:
        ConfigError: The file's name does not end in ``.html``.
        DataError: Fewer than two runs, or a document of another format or without settings.
        MissingExtraError: matplotlib is not installed.
        DataFileError: A file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"The comparison cannot be written to {str(path)!r}: it is an HTML page with a .json "
            "file beside it; give a name that ends in .html."
        )
    if len(runs) < 2:
        raise DataError(
            f"{len(runs)} run{'' if len(runs) == 1 else 's'} cannot be compared; give at least two."
        )
    read = [Run(results) for results in runs]
    plots.require_matplotlib()
    found, panels = differences(read), plots.comparison_panels(read)
    page = render("comparison.html", runs=read, differences=found, panels=panels)
    document = json.dumps(jsonable(_document(read, found)), indent=2, allow_nan=False)
    write(path.with_suffix(".json"), f"{document}\n".encode())
    return write(path, page)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fusion_detox.evaluation.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (reading.line, numbers.words, numbers.label, numbers.size, numbers.as_json)
    environment.filters.update({function.__name__: function for function in filters})
    environment.globals.update(
        reading=reading,
        numbers=numbers,
        findings=findings,
        peers=peers,
        tables=tables,
        svg_uri=lambda panel: plots.svg_uri(panel),
        **assets(),
    )
    return environment


def assets(script: str = "report.js", *styles: str) -> dict[str, str]:
    """The script and the styles of a page, for its template; ``report.css`` is always included."""
    text = (_TEMPLATES / script).read_text("utf-8")
    sheets = [(_TEMPLATES / name).read_text("utf-8") for name in ("report.css", *styles)]
    return {
        "style": Markup("\n".join(sheets)),
        "script": Markup(text),
        # Only this script may run, even if text from the data were ever taken for HTML.
        "script_hash": base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    }


def render(template: str, **context: Any) -> bytes:
    """Fill a template; its script and style are ``report.js`` and ``report.css`` unless given."""
    page = _environment().get_template(template).render(context)
    return reading.printable(page).encode()


def write(path: Path, data: bytes) -> Path:
    """Write a file whole, and create its folder if needed; raises ``DataFileError``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise DataFileError(
            f"{path} cannot be written ({error}); choose a writable folder."
        ) from error
    return path


def _document(runs: Sequence[Run], found: Sequence[Difference]) -> dict[str, Any]:
    """The comparison as JSON."""
    labelled = list(zip(runs, run_labels(runs), strict=True))
    return {
        "format": FORMAT,
        "runs": [
            {"run": label, "name": run.name, **{key: run.results.get(key) for key in _OF_RUN}}
            for run, label in labelled
        ],
        "differences": [asdict(one) for one in found],
        "settings": [
            {"run": label, **{key: variant.get(key) for key in _OF_VARIANT}}
            for run, label in labelled
            for variant in run.variants
        ],
    }
