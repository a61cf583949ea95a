"""``fusion-detox explain``: the same numbers in the terminal, as a page and as JSON."""

import json

import pytest

from fusion_detox.cli import main


@pytest.fixture
def explain(target_folder, calibrator_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        common = ("--calibrator", calibrator_folder, "--device", "cpu", "--max-new-tokens", "5")
        return main(["explain", str(target_folder), *map(str, (*arguments, *common))])

    return run


def test_a_generated_text_is_shown_in_the_terminal(explain, capsys):
    assert explain("She reads", "--greedy") == 0
    out, err = capsys.readouterr()
    assert "Written with fusion." in out
    assert "She reads" in out
    assert "most probable after" in out
    assert err == ""
    assert explain("She reads", "--greedy", "--strength", 0, "--base") == 0
    out = capsys.readouterr().out
    assert "Written without fusion" in out
    assert "0 of 5 tokens are" in out
    assert out.count("unchanged") == 5


def test_a_given_text_becomes_a_page(explain, capsys, tmp_path):
    path = tmp_path / "pages" / "one.html"
    assert explain("She", "--text", " reads <b>three</b>", "-o", path, "--top", 2) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "one.html and " in err
    values = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert "".join(token["text"] for token in values["tokens"]) == " reads <b>three</b>"
    assert {len(token["after"]) for token in values["tokens"]} == {2}
    assert "<b>three" not in path.read_text("utf-8")
    assert explain("--text", "She reads", "-o", path) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "-o", "page.json"), "give a name that ends in .html"),
        (("x", "--text", "y", "--base"), "drop one of them"),
        ((), "there is no prompt: give one"),
        (("x", "--top", "0"), "top must be a whole number"),
        (("x", "--chat"), "has no chat template"),
        (("x", "--alignment", "y"), "--alignment is for the aligned rules"),
        (("x", "--strength", "-1"), "strength must be a number of at least 0"),
    ],
)
def test_wrong_use_is_explained(explain, capsys, arguments, message):
    assert explain(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in " ".join(err.split())
