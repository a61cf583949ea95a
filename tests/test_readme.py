"""The README and the documentation are true: their code runs offline and their commands exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
pages = pytest.mark.parametrize("page", PAGES)
# A comment before a block says why it is not run: <!-- not run: needs a GPU -->
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n+)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
OUTPUT = "text"


def blocks(page, *kinds, running=False):
    found = [block for block in BLOCK.finditer(PAGES[page]) if block["kind"] in kinds]
    return [block["text"] for block in found if not (running and block["why"])]


def commands(page, running=False):
    """The command lines of a page, as lists of words."""
    for block in blocks(page, "bash", running=running):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s*(?:&&|\||;)\s*", line):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for all pages, so that a vocabulary map is built once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FUSION_DETOX_CACHE", "XDG_CACHE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


def run(words, folder):
    (folder / "examples").symlink_to(ROOT / "examples")  # paths start at the repository's root
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", running=True)])
def test_code_runs_offline(page, tmp_path):
    """All blocks of a page run in order in one namespace, as if a reader pasted them."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python", running=True)), encoding="utf-8")
    printed = run([script.name], tmp_path)
    position = 0  # the outputs promised by "# => " are printed, in this order
    for promised in re.findall(r"# => (.+)$", script.read_text(encoding="utf-8"), re.M):
        position = printed.find(promised, position)
        assert position >= 0, f"{promised!r} was not printed:\n{printed}"
        position += len(promised)


def test_the_readme_quotes_the_output_without_fusion(tmp_path):
    """The README masks the vowels."""
    pattern = r"Without the processor, the same call\s+prints\s+`(.+?)`"
    quoted = re.search(pattern, PAGES["README.md"])[1]
    code = "\n".join(blocks("README.md", "python"))
    unfused = code.replace(", logits_processor=[processor]", "")
    assert unfused != code
    script = tmp_path / "page.py"
    script.write_text(unfused, encoding="utf-8")
    printed = run([script.name], tmp_path).strip()
    assert re.fullmatch(re.escape(quoted).replace(r"\*", "."), printed)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash", running=True)])
def test_commands_run_offline(page, tmp_path):
    for number, (program, *words) in enumerate(commands(page, running=True)):
        assert program == "fusion-detox", f"say why {program!r} is not run: <!-- not run: ... -->"
        (folder := tmp_path / str(number)).mkdir()
        assert run(["-m", "fusion_detox", *words], folder)


@pages
def test_every_block_is_code_or_output_of_a_known_kind(page):
    assert PAGES[page].count("```") == 2 * len(BLOCK.findall(PAGES[page]))
    assert {block["kind"] for block in BLOCK.finditer(PAGES[page])} <= {
        "bash",
        "json",
        "python",
        OUTPUT,
    }
    for block in blocks(page, "json"):
        for line in block.splitlines():
            json.loads(line)
    for block in blocks(page, "python"):
        compile(block, page, "exec")


def test_the_readme_is_short_and_sets_up_with_two_commands():
    assert len(PAGES["README.md"].split()) <= 800
    assert len(PAGES["README.md"].splitlines()) <= 110
    makes = [tuple(words[1:2]) for words in commands("README.md") if words[0] == "make"]
    assert set(makes) == {("demo",), ("test",)}


def test_the_number_of_decoding_modes_is_stated_once():
    """Only in the document that the conformance suite writes."""
    texts = {**PAGES, "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
    stated = [page for page, text in texts.items() if re.search(r"\d+ (decoding )?modes", text)]
    assert stated == ["docs/decoding-modes.md"]


def check_make(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert next(word for word in words if "=" not in word) in targets


def check_cli(words):
    import typer.main

    from fusion_detox.cli import app

    known = typer.main.get_command(app).commands
    assert words[0] in known or words[0].startswith("--")
    # Some commands pass their options on to another program.
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


def check_python(words):
    if words[:2] == ["-m", "fusion_detox"]:
        check_cli(words[2:])
    else:
        assert words[0] == "-m" or (ROOT / words[0]).is_file(), words


def check_launcher(words):
    ours = [word for word in words if re.match(r"(?:.*/)?fusion[-_]detox", word)]
    assert ours, f"the launcher starts something other than fusion-detox: {words}"
    check_cli(words[words.index(ours[0]) + 1 :])


CHECKS = {
    "accelerate": check_launcher,
    "fusion-detox": check_cli,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_launcher,
}


@pages
def test_commands_exist(page):
    for program, *words in commands(page):
        program = "python" if program.endswith("bin/python") else program
        if program in CHECKS:
            CHECKS[program](words)
        else:
            assert program in ("cd", "curl", "git", "pre-commit", "vllm"), (
                f"unknown command {program!r}"
            )


@pages
def test_links_resolve(page):
    links = re.findall(r"\]\(([^)#\s]+)", PAGES[page])
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert not [link for link in local if not (ROOT / page).parent.joinpath(link).exists()]


def test_the_paths_in_contributing_exist():
    text = PAGES["CONTRIBUTING.md"]
    section = text.partition("## Where to find what")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| [^|]+\? \| ([^|]+) \|$", section, re.M)
    table = [path for row in rows for path in re.findall(r"`([\w./]+)`", row)]
    assert len(table) >= 10
    assert not [path for path in table if not (ROOT / "fusion_detox" / path).exists()]
    named = re.findall(r"`((?:fusion_detox|tests|docs|benchmarks|examples|\.ci)/[\w./-]*)`", text)
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_contributing_lists_the_rooms_in_order():
    section = PAGES["CONTRIBUTING.md"].partition("## The rooms")[2].partition("\n## ")[0]
    layers = (ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8")
    rooms = re.search(r"^ROOMS = \((.+?)\)$", layers, re.M | re.S)[1]
    told = re.findall(r"^\| `(\w+)` \|", section, re.M)
    assert [*told, "__main__"] == re.findall(r'"(\w+)"', rooms)
