"""No command sends the terminal an escape from a name, a card, a prompt, a text or a setting."""

import ast
import io
import json
import logging
import re
import shutil
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from fusion_detox import cli
from fusion_detox.cli import console, main
from fusion_detox.files.printable import printable, printable_json

# Clear the screen, set the title, a link, an 8-bit CSI, and an override of the order.
EVIL = "a\x1b[2J\x1b]0;t\x07\x1b]8;;http:x\x1b\\\x9b31m\u202eb\u2066c\x7f\rd[/red]:fire:"
SMALL = [
    *("--samples", "1", "--max-new-tokens", "2", "--scorer", "lexical", "--resamples", "100"),
    *("--harmless-texts", "2", "--harmless-tokens", "8", "--device", "cpu", "--suite", "none"),
    *("--no-similarity", "--setting", "default"),
]

WRONG = [
    ["demo", "--calibrator", EVIL],
    ["demo", "--target", EVIL],
    ["explain", EVIL, "x"],
    ["explain", "x", EVIL, "--calibrator", EVIL],
    ["explain", "x", "y", "-o", EVIL],
    ["generate", EVIL, "x"],
    ["generate", "x", EVIL, "--calibrator", EVIL],
    ["generate", "x", "--prompts-file", EVIL],
    ["generate", "x", "y", "--strength", EVIL],
    ["generate", "x", "y", "--rule", EVIL],
    ["generate", "x", "y", f"--{EVIL}"],
    ["playground", "x", "--calibrator", "y", "--host", EVIL, "--no-browser", "--port", "0"],
    ["info", EVIL],
    ["info", "english-16k", "--target", EVIL],
    ["evaluate", EVIL, "--prompts", EVIL, "--out", "x"],
    ["rescore", EVIL],
    ["compare", EVIL, EVIL],
    ["tune", EVIL, "--prompts", EVIL, "--out", "x"],
    ["tune", "x", "--prompts", "x", "--out", "x", "--grid", EVIL],
    ["align", "--calibrator", EVIL, "--target", "x"],
    ["align", "--calibrator", "english-16k", "--target", EVIL],
    ["train-calibrator", EVIL, "--general", EVIL],
    ["train-calibrator", "x", "--general", "x", "--fusion", EVIL],
    ["finetune", EVIL, "x", "--pairs", EVIL],
    ["make-negatives", "--in", EVIL, "--out", "x", "--model", EVIL],
    ["make-negatives", "--in", "x", "--out", "x", "--model", "x", "--endpoint", EVIL],
    ["fetch-target", EVIL],
    ["lm-eval", EVIL],
    [EVIL],
]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSION_DETOX_DEBUG", raising=False)


def unsafe(text):
    return sorted({one for one in text if printable(one) != one} - {"\r"})


@pytest.fixture
def run(capfd):
    """Run a command; its output must be safe. Return the exit code and the output."""

    def run(*arguments):
        code = main([str(one) for one in arguments])
        found = capfd.readouterr()
        assert "Traceback" not in found.err
        assert unsafe(found.out + found.err) == []
        return code, found.out + found.err

    return run


@pytest.fixture
def evil_folder(calibrator_folder, tmp_path):
    """A calibrator whose name and record are hostile."""
    folder = tmp_path / EVIL.replace("/", "")
    shutil.copytree(calibrator_folder, folder)
    record = json.loads((folder / "training.json").read_text())
    record |= {EVIL: EVIL, "command": EVIL, "data": [{"name": EVIL, EVIL: EVIL}]}
    (folder / "training.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("arguments", WRONG, ids=range(len(WRONG)))
def test_wrong_use_with_hostile_arguments(run, arguments, tmp_path, monkeypatch):
    if arguments[0] == "lm-eval":
        pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    code, text = run(*arguments)
    assert code in (1, 2)
    assert text


def test_every_command_is_tested_with_hostile_arguments():
    tested = {arguments[0] for arguments in WRONG}
    names = {one.name or one.callback.__name__ for one in cli.app.registered_commands}
    assert names <= tested | {"doctor"}


def test_info_and_demo_of_a_hostile_calibrator(run, evil_folder, target_folder):
    for more in ([], ["--training"], ["--json"], ["--target", target_folder]):
        code, text = run("info", evil_folder, *more)
        assert code == 0
        assert "[red]:fire:" in text, "neither markup nor emoji codes are interpreted"
    asked = ["demo", "--calibrator", evil_folder, "--target", target_folder]
    assert run(*asked, "--max-new-tokens", "2")[0] == 0


def test_generate_writes_hostile_prompts_as_json_that_loses_nothing(
    capfd, calibrator_folder, target_folder, tmp_path
):
    common = ["--calibrator", str(calibrator_folder), "--max-new-tokens", "2"]
    assert main(["generate", str(target_folder), EVIL, *common]) == 0
    found = capfd.readouterr()
    assert unsafe(found.out + found.err) == []
    assert json.loads(found.out)["prompt"] == EVIL
    output = tmp_path / EVIL.replace("/", "")
    assert main(["generate", str(target_folder), EVIL, *common, "-o", str(output)]) == 0
    assert unsafe(capfd.readouterr().err) == []
    assert unsafe(output.read_text()) == []


def test_evaluation_of_hostile_prompts(run, evil_folder, target_folder, tmp_path):
    prompts = tmp_path / "\x1b[2Jprompts.jsonl"
    prompts.write_text(json.dumps({"prompt": EVIL}) + "\n" + json.dumps({"prompt": "a"}) + "\n")
    out = tmp_path / "\x1b[2Jout"
    target = shutil.copytree(target_folder, tmp_path / "\x1b[2J\u202etarget")
    common = ["--calibrator", evil_folder, "--prompts", prompts, "--out", out]
    assert run("evaluate", target, *common, *SMALL)[0] == 0
    assert run("rescore", out)[0] == 0
    assert run("compare", out, out, "--out", tmp_path / "\x1b[2J.html")[0] == 0


def test_a_colour_terminal_gets_only_our_own_escapes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal = io.StringIO()
    one = console.results()
    one.file = terminal
    assert isinstance(one, Console)
    table = Table(EVIL, title=EVIL, caption=EVIL)
    table.add_row(EVIL, style="bold red")
    one.print(table, EVIL, f"{EVIL}\ttab")
    text = terminal.getvalue()
    assert "\x1b[1;31m" in text, "the table has colours"
    assert unsafe(re.sub(r"\x1b\[[0-9;]*m", "", text)) == []
    assert "[/red]:fire:" in text, "neither markup nor emoji codes are interpreted"
    widths = {len(line) for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[1:5]}
    assert len(widths) == 1, "the table stays aligned"


def test_warnings_and_log_lines(capfd):
    with console.quiet_libraries():
        warnings.simplefilter("always")
        warnings.warn(EVIL, UserWarning, stacklevel=1)
    with console.plain_log():
        logging.getLogger("fusion_detox.some").warning("%s", EVIL)
    err = capfd.readouterr().err
    assert err.count("[/red]") >= 1
    assert unsafe(err) == []


def test_json_keeps_every_character():
    for text in (EVIL, "".join(map(chr, range(0x300))), "".join(map(chr, range(0x2000, 0x2100)))):
        written = printable_json({text: [text]})
        assert json.loads(written) == {text: [text]}
        assert unsafe(written) == []
    assert printable("a\tb\nc é \u200d\U0001f469") == "a\tb\nc é \u200d\U0001f469"


def test_commands_print_through_the_console_only():
    forbidden = {"typer.echo", "click.echo", "Console(", "rich.print", "sys.stderr.write"}
    for path in Path(cli.__file__).parent.glob("*.py"):
        if path.name == "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                allowed = path.name == "__init__.py" and "__version__" in ast.unparse(node)
                assert called not in forbidden or allowed, f"{path.name}, line {node.lineno}"
                assert called != "Console", f"{path.name}, line {node.lineno}"
