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
STATES = {"exact": "exact", "note": "works, see the note", "refused": "refused, with the reason"}
START = """\
# Decoding modes

<!-- Written by tests/conformance/document.py from tests/conformance/modes.py; do not edit. -->

What `generate()` of `transformers` can do, and what becomes of fusion in it. **exact**: the
conformance suite compares every token, with fixed seeds, with a definition in plain Python: no
cache, no batching, the whole text tokenised again for the calibrator at every step, and a loop that
spells the search out (for drafts under sampling and for watermarks: `generate`'s own loop over that
definition). In greedy search, sampling and beam search all scores are compared too, to 1e-4. Most
modes run on three targets: one with the calibrator's own vocabulary, one with another byte-level
vocabulary, and one with a SentencePiece vocabulary.

"""


def suite():
    """The suite's test functions, and the file of each."""
    found = {}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = path.name
    return found


def document(modes):
    """The file's text."""
    known = suite()
    counts = {state: sum(mode.state == state for mode in modes) for state in STATES}
    tally = ", ".join(f"{count} {STATES[state]}" for state, count in counts.items())
    lines = [START + f"{len(modes)} modes: {tally}."]
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
