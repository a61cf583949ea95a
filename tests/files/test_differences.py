"""Differences between JSON values are reported by path."""

from fusion_detox.files.differences import differences


def test_differences_are_reported_by_path():
    before = {"a": {"b": 1, "c": [1, {"d": 2}], "e": [1]}, "same": [1, 2], "gone": 3}
    now = {"a": {"b": 2, "c": [1, {"d": 5}], "e": [1, 2]}, "same": [1, 2], "new": None, "x": 4}
    assert list(differences(before, now)) == [
        ("a.b", 1, 2),
        ("a.c[1].d", 2, 5),
        ("a.e", [1], [1, 2]),
        ("gone", 3, None),
        ("x", None, 4),
    ]
    assert list(differences(before, before)) == []
