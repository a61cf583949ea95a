"""Writes docs/decoding-modes.md from the conformance suite.

python tests/conformance/document.py            writes the file
python tests/conformance/document.py --check    fails if the file is out of date
"""

from __future__ import annotations

import ast
import runpy
import sys
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "docs" / "decoding-modes.md"
STATES = ("exact", "note", "refused")
START = """\
# Decoding modes

<!-- Written by tests/conformance/document.py from tests/conformance/modes.py; do not edit. -->

How fusion behaves in each decoding mode of `generate()` in `transformers`:

- **exact**: every token equals that of a definition in plain Python, with fixed seeds. The
  definition has no cache and no batching. It tokenises the whole text again for the calibrator at
  every step, and writes the search as a plain loop. (For sampled drafts and watermarks, the loop
  is that of `generate` itself.) In greedy search, sampling and beam search, all scores are compared
  too, to 1e-4.
- **note**: it works, with the restriction in the note.
- **refused**: it does not work, and the note says why.

Most modes run on three targets: one with the calibrator's own vocabulary, one with another
byte-level vocabulary, and one with a SentencePiece vocabulary.

"""


def suite():
    """Return the file of each of the suite's test functions."""
    found = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = path.name
    return found


def document(modes):
    """Return the document's text."""
    known = suite()
    counts = {state: sum(mode.state == state for mode in modes) for state in STATES}
    tally = "{exact} are exact, {note} have a note, and {refused} are refused.".format(**counts)
    lines = [f"{START}Of {len(modes)} modes, {tally}"]
    for group, members in groupby(modes, key=lambda mode: mode.group):
        lines += ["", f"## {group}", "", "| mode | state | note | test |", "|---|---|---|---|"]
        for mode in members:
            name = mode.name.replace("|", r"\|")
            note = mode.note.replace("|", r"\|")
            test = f"`{known[mode.test]}::{mode.test}`"
            lines.append(f"| {name} | {mode.state} | {note} | {test} |")
    return "\n".join(lines) + "\n"


def main():
    text = document(runpy.run_path(str(HERE / "modes.py"))["MODES"])
    if "--check" not in sys.argv[1:]:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(text, encoding="utf-8")
    elif not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
        sys.exit(f"{DOCUMENT} is out of date: run python tests/conformance/document.py")


if __name__ == "__main__":
    main()
