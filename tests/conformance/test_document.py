"""docs/decoding-modes.md agrees with the suite."""

from collections import Counter

from .document import DOCUMENT, document, suite
from .modes import MODES


def test_document_is_up_to_date():
    message = "run python tests/conformance/document.py"
    assert DOCUMENT.read_text(encoding="utf-8") == document(MODES), message


def test_every_mode_has_a_test_and_a_unique_name():
    assert not {mode.test for mode in MODES} - set(suite())
    assert not [name for name, count in Counter(m.name for m in MODES).items() if count > 1]
    # A note says what "note" or "refused" means for the user.
    assert not [mode.name for mode in MODES if mode.state != "exact" and not mode.note]
