"""The frame of a page: one file that loads nothing, and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion_detox.errors import DataFileError
from fusion_detox.evaluation.report.markup import Html, join, line, tag
from fusion_detox.files.atomic import write_whole

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Section:
    """A section of the page; without content it is left out."""

    ident: str
    title: str
    content: Html | None


def page(heading: str, above: str, below: object, sections: Sequence[Section], foot: str) -> str:
    """A whole page.

    Args:
        heading: Its title.
        above: A line above the title.
        below: A line below it.
        sections: The content.
        foot: The last line.
    """
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Should a text of the data ever get out of its place, its scripts would not run: only the
    # one with this hash does. Plots carry style attributes.
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    kept = [section for section in sections if section.content]
    contents = tag(
        "nav",
        tag("h2", "Contents"),
        tag("ol", *(tag("li", tag("a", s.title, href=f"#{s.ident}")) for s in kept)),
        aria_label="Contents",
    )
    body = [
        tag(
            "section",
            tag("h2", section.title, id=section.ident, tabindex="-1"),
            section.content,
            aria_labelledby=section.ident,
        )
        for section in kept
    ]
    first = kept[0].ident if kept else "top"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", line(heading, 120)),
        tag("style", Html(style)),
    )
    header = tag(
        "header",
        tag("p", above, class_="above"),
        tag("h1", line(heading), id="top"),
        tag("p", below, class_="below"),
    )
    document = tag(
        "html",
        head,
        tag(
            "body",
            tag("a", "To the content", href=f"#{first}", class_="skip"),
            header,
            tag("div", contents, tag("main", *body), class_="columns"),
            tag("footer", tag("p", foot)),
            tag("script", Html(script)),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{join([document])}\n"


def write(path: Path, content: str | bytes) -> Path:
    """Writes a file so that it is either whole or as before.

    Raises:
        DataFileError: It cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise DataFileError(
            f"{path} cannot be written ({error}); choose a folder that can."
        ) from error
    return path
