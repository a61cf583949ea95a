"""JSON that some parser cannot handle is refused before that parser sees it."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_detox.files.untrusted import check_regular, parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**38), 10**38) | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@given(VALUES, st.booleans())
def test_usual_values_are_read_as_they_are(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    if "Infinity" not in text:
        assert parse_json(text) == value
    assert parse_json(text, finite=False) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 101 + "]" * 101, "deeper than 100 levels"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "deeper than 100 levels"),
        ("[" * 1_000_000, "deeper than 100 levels"),
        ('{"a": ' + "9" * 5_000 + "}", "a number of 5000 digits"),
        ('{"a": NaN}', "NaN, which is not a finite number"),
        ("[-Infinity]", "-Infinity, which is not"),
        ('{"a": 1e999}', "1e999, which is not a finite number"),
        (r'["\ud83d"]', r"\\ud83d is half of a surrogate pair"),
        (r'{"\udc00": 1}', r"\\udc00 is half of a surrogate pair"),
        ("{", "Expecting property name"),
    ],
    ids=range(10),
)
def test_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_limits_are_not_too_tight():
    assert parse_json("[" * 100 + "]" * 100)
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}')
    assert parse_json(r'["\ud83d\ude42"]') == ["🙂"]
    assert math.isnan(parse_json("NaN", finite=False))


def test_files(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UnicodeDecodeError):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")
    with pytest.raises(OSError, match="it is a folder, not a regular file"):
        check_regular(tmp_path)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate((1 << 28) + 1)  # without taking space on the disk
    with pytest.raises(ValueError, match="more than 256 MiB"):
        read_json(tmp_path / "large.json")
