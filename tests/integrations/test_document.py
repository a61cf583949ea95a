"""docs/serving/index.md agrees with the tests."""

from .document import BEGIN, DOCUMENT, END, ENGINES, FEATURES, STATES, document, marks


def test_the_table_is_up_to_date():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    message = "run python tests/integrations/document.py"
    assert text == document(text, list(marks())), message


def test_every_marker_is_known_and_agrees_with_the_others():
    states = {}
    for engine, feature, state, test in marks():
        assert engine in ENGINES, test
        assert feature in FEATURES, test
        assert state in STATES, test
        assert states.setdefault((engine, feature), state) == state, test


def test_every_engine_has_a_page():
    assert not [page for page in ENGINES.values() if not (DOCUMENT.parent / page).is_file()]
