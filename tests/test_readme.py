"""The README is true: its code runs offline, its commands and options exist."""

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
# A comment before a block says why it is not run: <!-- not run: needs a GPU -->
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n+)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


def blocks(*kinds):
    text = README.read_text(encoding="utf-8") if README.is_file() else ""
    return [found for found in BLOCK.finditer(text) if found["kind"] in kinds]


def commands():
    """The README's command lines, as lists of words."""
    for block in blocks("bash", "sh", "console"):
        for line in block["text"].replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            for part in re.split(r"\s*(?:&&|\||;)\s*", line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words


def test_code_runs_offline(tmp_path):
    code = [block for block in blocks("python") if not block["why"]]
    if not code:
        pytest.skip("README.md has no Python blocks yet")
    if not list(ROOT.glob("calibration_ckpts/*/calibrator.json")):
        pytest.skip("the shipped calibrator is not in this checkout yet")
    if not (ROOT / "examples" / "demo_target" / "model" / "config.json").is_file():
        pytest.skip("the demo target is not in this checkout yet")
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # paths of the README start at the root
    # One after the other in one namespace, as a reader would paste them.
    script = tmp_path / "readme.py"
    script.write_text("\n".join(block["text"] for block in code), encoding="utf-8")
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    position = 0  # what "# => " promises is printed, in this order
    for promised in re.findall(r"# => (.+)$", script.read_text(encoding="utf-8"), re.M):
        position = done.stdout.find(promised, position)
        assert position >= 0, f"{promised!r} was not printed:\n{done.stdout}"
        position += len(promised)


def test_two_commands_do_the_set_up():
    if not README.is_file():
        pytest.skip("README.md is not written yet")
    makes = [tuple(words[1:2]) for words in commands() if words[0] == "make"]
    assert set(makes) == {("demo",), ("test",)}


def check_make(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert next(word for word in words if "=" not in word) in targets


def check_cli(words):
    import typer.main

    from fusion_detox.cli import app

    known = typer.main.get_command(app).commands
    assert words[0] in known or words[0].startswith("--")
    # Some commands hand their options on to another program.
    if words[0] in known and not known[words[0]].context_settings.get("ignore_unknown_options"):
        options = {"--help"}
        for parameter in known[words[0]].params:
            options.update(parameter.opts, parameter.secondary_opts)
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        assert used <= options


def check_pip(words):
    extras = metadata("fusion-detox").get_all("Provides-Extra")
    for word in words:
        if found := re.fullmatch(r"(?:fusion-detox|\.)\[(.+)\]", word):
            assert set(found[1].split(",")) <= set(extras)


def test_commands_exist():
    if not README.is_file():
        pytest.skip("README.md is not written yet")
    for program, *rest in commands():
        if program == "make":
            check_make(rest)
        elif program == "fusion-detox":
            check_cli(rest)
        elif program == "pip":
            check_pip(rest)
        elif program in ("python", "python3"):
            if rest[:2] == ["-m", "fusion_detox"]:
                check_cli(rest[2:])
            else:
                assert rest[0] == "-m" or (ROOT / rest[0]).is_file(), rest
        elif program in ("accelerate", "torchrun"):
            ours = [word for word in rest if re.match(r"(?:.*/)?fusion[-_]detox", word)]
            assert ours, f"{program} starts something else than fusion-detox: {rest}"
            check_cli(rest[rest.index(ours[0]) + 1 :])
        else:
            assert program in ("git", "cd", "cat", "echo", "head"), f"unknown command {program!r}"


def test_links_lead_somewhere():
    if not README.is_file():
        pytest.skip("README.md is not written yet")
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert not [link for link in local if not (ROOT / link).exists()]
